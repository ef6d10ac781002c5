"""HunyuanVideo's VAE: recorded activations, names, causality, tiles, and what its options do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.params import Network
from opensora_jax.vaes import hunyuan_vae
from opensora_jax.verify.case import Case
from tests.checks import check_case, check_manifest, check_round_trip, existing, random_params

TINY = hunyuan_vae.Config(
    block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=2, spatial_compression_ratio=4
)


def network(cfg):
    return Network.of(lambda rngs: hunyuan_vae.build(cfg, rngs=rngs))


@pytest.fixture(scope="module")
def tiny():
    net = network(TINY)
    return net, random_params(net)


@pytest.mark.parametrize("case", ["hunyuan_vae_basic", "hunyuan_vae_tiling_both"])
def test_recorded_activations(goldens, case):
    check_case(goldens, case)


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "hunyuan_vae", "vaes", "hunyuan_vae", preset="hunyuan_vae")


def test_round_trip(goldens):
    case = Case(existing(goldens / "hunyuan_vae_basic"))
    check_round_trip(case.weights, "vaes", "hunyuan_vae", case.config)


@pytest.mark.parametrize(
    "time, space, blocks, factors",
    [
        (4, 8, 4, ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        (8, 8, 4, ((2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        (4, 4, 4, ((1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 1))),
        (4, 8, 3, ((2, 2, 2), (2, 2, 2), (1, 2, 2))),
    ],
)
def test_where_size_changes(time, space, blocks, factors):
    cfg = hunyuan_vae.Config(
        time_compression_ratio=time,
        spatial_compression_ratio=space,
        block_out_channels=(4,) * blocks,
        norm_num_groups=2,
    )
    assert cfg.factors == factors
    clip = hunyuan_vae.inputs(cfg, LatentShape(1, 3, 2, 5))["x"].shape
    assert hunyuan_vae.latent_size(cfg, *clip[1:4]) == (3, 2, 5)


def test_frames_do_not_see_the_future(tiny):
    """The posterior of the first frames is that of the clip without the others, up to group norms over all frames."""
    net, params = tiny
    clip = jax.random.normal(jax.random.key(1), (1, 9, 8, 8, 3))
    later = clip.at[:, 5:].set(-clip[:, 5:])
    conv = jax.jit(lambda x: net.module(params).encoder.conv_in(x))
    np.testing.assert_array_equal(conv(clip)[:, :5], conv(later)[:, :5])
    features = jax.random.normal(jax.random.key(2), (1, 3 * 4, 1, 8))

    def attended(values):
        return hunyuan_vae.frame_causal_attention(features, features, values, frames=3)

    changed = features.at[:, 8:].set(0)
    np.testing.assert_array_equal(attended(features)[:, :8], attended(changed)[:, :8])
    assert not np.allclose(attended(features)[:, 8:], attended(changed)[:, 8:])


def test_slices_and_small_clips_do_not_change_the_result(tiny):
    """One sample at a time, and tiles larger than the clip: the same numbers."""
    net, params = tiny
    options = dict(use_slicing=True, use_spatial_tiling=True, use_temporal_tiling=True)
    sliced = network(dataclasses.replace(TINY, **options))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8, 12, 3))

    def both_ways(net):
        def run(params, x):
            z = net(params, x, method="encode")
            return z, net(params, z, num_frames=4, method="decode")

        return jax.jit(run)(params, x)

    (z, y), (z_sliced, y_sliced) = both_ways(net), both_ways(sliced)
    assert z.shape == (2, 2, 2, 3, 2) and y.shape == (2, 4, 8, 12, 3)
    np.testing.assert_allclose(z_sliced, z, atol=1e-5)
    np.testing.assert_allclose(y_sliced, y, atol=1e-5)


def test_mistakes_are_told(tiny):
    net, params = tiny
    with pytest.raises(UserError, match="3 latent frames hold 9 frames, not 13"):
        net(params, jnp.zeros((1, 3, 2, 2, 2)), num_frames=13, method="decode")
    with pytest.raises(UserError, match="time_compression_ratio=2; choose 4 or 8"):
        hunyuan_vae.Config(time_compression_ratio=2)
