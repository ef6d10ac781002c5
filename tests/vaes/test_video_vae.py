"""The video VAE of Open-Sora 1.2: recorded activations, names, frame counts, micro clips, both posteriors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.nn.params import Network
from opensora_jax.vaes import sd_vae, video_vae
from opensora_jax.vaes.video_vae import latent_frames, pixel_frames
from opensora_jax.verify.case import Case
from tests.checks import check_case, check_manifest, check_round_trip, existing, random_params

IMAGE = sd_vae.Config(block_out_channels=(2, 4), layers_per_block=1, norm_num_groups=2, mid_block_attention=False)
TINY = video_vae.Config(
    spatial=IMAGE, filters=2, num_res_blocks=1, num_groups=2, channel_multipliers=(1, 2), temporal_downsample=(True,),
    micro_frame_size=4,
)  # fmt: skip


def network(cfg):
    return Network.of(lambda rngs: video_vae.build(cfg, rngs=rngs))


@pytest.fixture(scope="module")
def params():
    return random_params(network(TINY))


def test_recorded_activations(goldens):
    check_case(goldens, "v12_vae_micro17_a")


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "OpenSoraVAE_V1_2", "vaes", "video_vae", preset="OpenSoraVAE_V1_2")


def test_round_trip(goldens):
    case = Case(existing(goldens / "v12_vae_micro17_a"))
    check_round_trip(case.weights, "vaes", "video_vae", case.config)


def test_frame_counts():
    assert [latent_frames(n) for n in (0, 1, 4, 16, 17, 18, 20, 51, 204)] == [0, 1, 1, 4, 5, 6, 6, 15, 60]
    assert latent_frames(33, micro=None) == 9
    for latents in range(1, 40):
        frames = pixel_frames(latents)
        assert latent_frames(frames) == latents < latent_frames(frames + 1)


def test_clips_are_independent_and_may_wait_for_each_other(params):
    """Ten frames are clips of 4, 4 and 2: each gives what it gives alone, however many are in flight."""
    x_z = jax.random.normal(jax.random.key(1), (2, 10, 3, 2, 4))
    run = lambda cfg, x: jax.jit(lambda p, x: network(cfg)(p, x, method="encode_time").mean)(params, x)
    whole = run(TINY, x_z)
    assert whole.shape == (2, 5, 3, 2, 4)
    np.testing.assert_allclose(run(replace(TINY, micro_clip_batch=2), x_z), whole, atol=1e-5)
    np.testing.assert_allclose(run(TINY, x_z[:, 4:8]), whole[:, 2:4], atol=1e-5)
    assert not np.allclose(run(replace(TINY, micro_frame_size=None), x_z), whole, atol=1e-3)


def test_decoding_gives_the_frames_asked_for(params):
    z = jax.random.normal(jax.random.key(1), (1, 4, 3, 2, 4))
    decode = lambda frames: network(TINY)(params, z, frames, method="decode_time")
    shapes = [jax.eval_shape(lambda n=n: decode(n)).shape[1] for n in (7, 8, None)]
    assert shapes == [7, 8, 8]
    with pytest.raises(UserError, match="6 frames are 3 latent frames, but there are 4"):
        decode(6)


def test_training_sees_unnormalised_latents_and_both_posteriors_are_sampled(params):
    x = jax.random.normal(jax.random.key(1), (1, 5, 4, 4, 3))

    @jax.jit
    def run(params, x, noise):
        vae = network(TINY).module(params)
        return vae(x), vae.encode(x), vae.encode(x, noise=noise), vae.encode(x, jax.random.key(3))

    out, mean, *drawn = run(params, x, (jnp.ones((1, 5, 2, 2, 4)), jnp.ones((1, 3, 2, 2, 4))))
    assert out.x_rec.shape == x.shape and out.x_z.shape == out.x_z_rec.shape == (1, 5, 2, 2, 4)
    np.testing.assert_allclose((out.z - params["shift"]) / params["scale"], mean, rtol=1e-4, atol=1e-4)
    assert all(d.shape == mean.shape and not np.allclose(d, mean, atol=1e-3) for d in drawn)


def test_decode_undoes_the_normalisation_of_encode(params):
    z = jax.random.normal(jax.random.key(1), (1, 2, 2, 2, 4))
    vae = network(TINY).module(params)
    np.testing.assert_allclose(vae.denormalise(vae.normalise(z)), z, atol=1e-5)
    assert network(TINY).trainable["shift"] is False
