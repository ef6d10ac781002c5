"""Stable Video Diffusion's VAE: names there and back, its own recognition, time seen by the decoder."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.nn.params import Network
from opensora_jax.vaes import svd_vae
from opensora_jax.weights import engine, sd_vae
from opensora_jax.weights import svd_vae as table
from tests.checks import check_round_trip, ours, random_params

TINY = svd_vae.Config(block_out_channels=(32,), layers_per_block=1)


def network(cfg):
    return Network.of(lambda rngs: svd_vae.build(cfg, rngs=rngs))


def test_names_there_and_back():
    shapes = ours(network(svd_vae.Config(block_out_channels=(32, 64))))
    draw = lambda path: np.random.default_rng(len(path)).normal(size=shapes[path]).astype(np.float32)
    weights = dict(engine.reference_arrays(shapes, draw, table.RULES))
    check_round_trip(weights, "vaes", "svd_vae", {})
    assert weights["decoder.up_blocks.0.resnets.2.time_mixer.mix_factor"].shape == (1,)
    assert weights["decoder.mid_block.resnets.1.temporal_res_block.conv1.weight"].shape == (64, 64, 3, 1, 1)
    found = {name: array.shape for name, array in weights.items()}
    assert table.recognise(found, {}) and not sd_vae.recognise(found, {})


def test_the_decoder_sees_the_other_frames_of_a_piece():
    net = network(TINY)
    params = random_params(net)
    z = jax.random.normal(jax.random.key(1), (1, 8, 2, 2, 4))
    decode = jax.jit(lambda z: net(params, z, method="decode"))
    y, moved = decode(z), decode(z.at[:, 7].add(1.0))
    assert y.shape == (1, 8, 2, 2, 3)
    changed = jnp.abs(y - moved).max((0, 2, 3, 4)) > 1e-6
    assert changed[:7].any()
    apart = Network.of(lambda rngs: svd_vae.build(svd_vae.Config(**vars(TINY) | {"micro_batch_size": 4}), rngs=rngs))
    pieces = jax.jit(lambda z: apart(params, z, method="decode"))
    np.testing.assert_array_equal(pieces(z)[:, :4], pieces(z.at[:, 7].add(1.0))[:, :4])  # a piece sees only itself
