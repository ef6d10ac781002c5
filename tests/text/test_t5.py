"""T5's encoder: recorded activations, names, buckets, masks, the ungated variant, remat."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.nn.params import Network
from opensora_jax.text import t5
from opensora_jax.verify.case import Case
from opensora_jax.weights import engine
from opensora_jax.weights import t5 as table
from tests.checks import check_case, check_manifest, check_round_trip, existing, random_params

TINY = t5.Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)


def network(cfg):
    return Network.of(lambda rngs: t5.build(cfg, rngs=rngs))


@pytest.fixture(scope="module")
def params():
    return random_params(network(TINY))


def test_recorded_activations(goldens):
    check_case(goldens, "t5_v11_tiny")


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "t5_v1_1_xxl_encoder", "text", "t5", preset="t5-v1_1-xxl")


def test_round_trip(goldens):
    case = Case(existing(goldens / "t5_v11_tiny"))
    check_round_trip(case.weights, "text", "t5", case.config)


def test_the_ungated_variant_reads_and_writes_its_own_names():
    cfg = replace(TINY, feed_forward_proj="relu")
    ours = {path: leaf.shape for path, leaf in engine.flatten(network(cfg).abstract).items()}
    names = dict(engine.reference_arrays(ours, lambda path: np.zeros(ours[path], np.float32), table.RULES))
    assert names["encoder.block.1.layer.1.DenseReluDense.wi.weight"].shape == (12, 8)
    check_round_trip(names, "text", "t5", {})
    # The decoder of a whole T5 is left out.
    names["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.zeros((8, 8), np.float32)
    names["lm_head.weight"] = np.zeros((20, 8), np.float32)
    check_round_trip(names, "text", "t5", {})
    assert t5.Config(**table.config_from({k: v.shape for k, v in names.items()}, {})) == cfg


def test_buckets_of_distances():
    """Thirty-two buckets to 128: 16 behind, 16 ahead; the first 8 of each exact, then logarithmic, then all the rest."""
    distance = np.array([0, -1, -7, -8, -127, -128, -1000, 1, 7, 8, 64, 500])
    assert t5.relative_buckets(distance, 32, 128).tolist() == [0, 1, 7, 8, 15, 15, 15, 17, 23, 24, 30, 31]
    for far in (9, 20, 33, 90):
        expect = 8 + int(math.log(far / 8) / math.log(128 / 8) * 8)
        assert t5.relative_buckets(np.array([-far]), 32, 128) == expect


def test_hidden_tokens_change_nothing_and_no_mask_attends_to_all(params):
    run = jax.jit(lambda ids, mask: network(TINY)(params, ids, mask))
    ids = jnp.array([[3, 4, 5, 0, 0]])
    mask = jnp.array([[1, 1, 1, 0, 0]])
    kept = run(ids, mask)[:, :3]
    np.testing.assert_allclose(run(ids.at[:, 3:].set(9), mask)[:, :3], kept, atol=1e-5)
    everything = jax.jit(lambda ids: network(TINY)(params, ids))
    assert not np.allclose(everything(ids)[:, :3], kept, atol=1e-3)
    np.testing.assert_allclose(everything(ids), run(ids, jnp.ones_like(mask)), atol=1e-5)


def test_remat_keeps_values_and_gradients(params):
    ids = jnp.array([[3, 4, 5]])

    def gradients(remat):
        net = network(replace(TINY, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.square(net(p, ids)).sum()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients("none"), gradients("full")
    )
