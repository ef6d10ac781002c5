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
    "sd_vae": IMAGE,
    "svd_vae": dict(block_out_channels=(32, 32), layers_per_block=1),
    "video_vae": dict(
        spatial=IMAGE, filters=4, num_res_blocks=1, num_groups=2, channel_multipliers=(1, 2), temporal_downsample=(True,),
        micro_frame_size=4,
    ),
    "video_vae_v13": dict(
        ch=32, encoder=dict(widths=(32, 32), num_res_blocks=1, time_levels=(0,)), micro_frame_size=3,
        decoder=dict(widths=(32, 32), num_res_blocks=1, time_levels=(1,)), temporal_downsample=2,
    ),
    "hunyuan_vae": dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4),
    "causal_vae": dict(
        hidden_size=32, hidden_size_mult=(1, 1), num_res_blocks=1,
        encoder_resnet_blocks=("ResnetBlock2D", "ResnetBlock3D"), decoder_resnet_blocks=("ResnetBlock3D",) * 2,
        encoder_spatial_downsample=("SpatialDownsample2x", ""), decoder_spatial_upsample=("", "SpatialUpsample2x"),
        encoder_temporal_downsample=("TimeDownsample2x", ""), decoder_temporal_upsample=("", "TimeUpsample2x"),
    ),
    "dc_ae": dict(
        latent_channels=4, spatial_compression_ratio=2, time_compression_ratio=1,
        encoder=dict(width_list=(8, 32), depth_list=(1, 1), block_type=("ResBlock", "EViTS5_GLU"), temporal=(False,) * 2),
        decoder=dict(width_list=(8, 32), depth_list=(1, 1), block_type=("ResBlock", "EViTS5_GLU"), temporal=(False,) * 2,
                     out_norm="rms3d", out_act="relu"),
    ),
    "vqvae": dict(embedding_dim=4, n_codes=8, n_hiddens=4, n_res_layers=1, downsample=(1, 2, 2)),
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
    assert sizes[0] < (0.8 if family == "vqvae" else 0.4) * sizes[1], sizes  # its axial attention gathers the picture
