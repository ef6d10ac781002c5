"""Video autoencoders under `context`: rows of the picture on eight devices, which trade borders, equal one device."""

import jax
import numpy as np
import pytest

from opensora_jax.config import part
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.system import System
from tests.checks import random_params

IMAGE = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
VAES = {
    "video_vae": dict(
        spatial=IMAGE, filters=4, num_res_blocks=1, num_groups=2, channel_multipliers=(1, 2), temporal_downsample=(True,),
        micro_frame_size=4,
    ),
    "hunyuan_vae": dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4),
}  # fmt: skip
FRAMES, SIDE = 5, 32


@pytest.mark.parametrize("family", VAES)
def test_rows_on_eight_devices_equal_one(family):
    system = System(vae=part("vaes", {"family": family} | VAES[family], "test"))
    params = random_params(system.networks["vae"])
    video = np.random.default_rng(0).uniform(-1, 1, (1, FRAMES, SIDE, SIDE, 3)).astype(np.float32)

    def both(params, video):
        latents = system.encode_video(params, video)
        return latents, system.decode_video(params, latents, FRAMES)

    alone = jax.jit(both).lower(params, video).compile()
    expected = jax.device_get(alone(params, video))
    layout = shard.layout(make_mesh(MeshConfig(data=1, context=8)), "fsdp_context")
    with shard.use(layout):
        params, video = jax.device_put((params, video), layout.replicated())
        shared = jax.jit(both).lower(params, video).compile()
        found = shared(params, video)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(jax.device_get(a), b, rtol=0, atol=2e-5 * np.abs(b).max())
    assert "collective-permute" in shared.as_text()
    sizes = [compiled.memory_analysis().temp_size_in_bytes for compiled in (shared, alone)]
    assert sizes[0] < 0.4 * sizes[1], sizes
