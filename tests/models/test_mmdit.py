"""MMDiT: recorded activations, full-size names, and what its options do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.common.packing import pack, unpack
from opensora_jax.common.shapes import LatentShape
from opensora_jax.models import mmdit
from opensora_jax.nn.params import Network
from opensora_jax.verify.case import Case
from opensora_jax.weights import layouts
from opensora_jax.weights import mmdit as table
from tests.checks import check_case, check_manifest, check_round_trip, existing, random_params

TINY = mmdit.Config(
    in_channels=8, vec_in_dim=6, context_in_dim=10, hidden_size=24, num_heads=2, depth=2, depth_single_blocks=2,
    axes_dim=(4, 4, 4), mlp_ratio=2.0,
)  # fmt: skip


def batch(cfg, **changes):
    shapes = mmdit.inputs(cfg, LatentShape(2, 3, 4, 6, text_tokens=5))
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return {name: jax.random.uniform(k, s.shape) for k, (name, s) in zip(keys, shapes.items())} | changes


@pytest.fixture(scope="module")
def tiny():
    net = Network.of(lambda rngs: mmdit.build(TINY, rngs=rngs))
    params = random_params(net)
    return net, params, jax.jit(net.__call__)


CASES = ["mmdit_release_like", "mmdit_fused_guidance_embednd"]


@pytest.mark.parametrize("name", CASES)
def test_recorded_activations(goldens, name):
    check_case(goldens, name)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(goldens, name):
    case = Case(existing(goldens / name))
    check_round_trip(case.weights, "models", "mmdit", case.config)


@pytest.mark.parametrize("preset", ["opensora2_mmdit_11b", "opensora2_mmdit_11b_dcae"])
def test_full_size_names_and_count(goldens, preset):
    check_manifest(goldens, preset, "models", "mmdit", preset=preset)


def test_flux_is_the_same_network_with_other_options():
    dev, schnell = (
        Network.of(lambda rngs, c=mmdit.PRESETS[n]: mmdit.build(c, rngs=rngs)).count()
        for n in ("flux-dev", "flux-schnell")
    )
    assert schnell == 11_891_178_560  # black-forest-labs/FLUX.1-schnell
    assert dev - schnell == 257 * 3072 + 3073 * 3072  # the guidance embedder


def test_video_in_and_out(tiny):
    """Latents go through as the packed tokens that the reference sees, the mask first in a token's condition."""
    net, params, forward = tiny
    given = batch(TINY)
    out = forward(params, **given)
    assert out.shape == given["x"].shape and out.dtype == jnp.float32
    rows = [(t, h, w) for t in range(3) for h in range(2) for w in range(3)]
    cond = np.asarray(given["cond"])
    tokens = [
        [cond[:, t, 2 * h + i, 2 * w + j, c] for c in range(3) for i in range(2) for j in range(2)] for t, h, w in rows
    ]
    packed = net(
        params, pack(given["x"], 2), np.asarray([rows], np.float32), given["y"], np.zeros((1, 5, 3), np.float32),
        given["t"], given["y_vec"], cond=np.moveaxis(np.asarray(tokens), -1, 0), method="packed",
    )  # fmt: skip
    np.testing.assert_allclose(unpack(packed, (3, 4, 6), 2), out, atol=1e-5)


def test_dropped_text_is_the_empty_prompt(tiny):
    _, params, forward = tiny
    given = batch(TINY)
    null = {"null_y": jnp.ones((1, 5, 10)), "null_y_vec": jnp.ones((1, 6))}
    dropped = forward(params, **given, **null, drop_text=jnp.array([True, False]), drop_vec=jnp.array([True, False]))
    given |= {"y": given["y"].at[0].set(1), "y_vec": given["y_vec"].at[0].set(1)}
    np.testing.assert_allclose(dropped, forward(params, **given), atol=1e-6)


def test_layouts_of_the_rotary_pairs_are_a_permutation_of_each_other(tiny):
    """FLUX.1's weights serve Open-Sora's layout when the channels of a head's q and k are taken evens first."""
    net, params, forward = tiny
    pairs = Network.of(lambda rngs: mmdit.build(dataclasses.replace(TINY, rope="pairs"), rngs=rngs))
    order = np.argsort(np.concatenate([np.arange(0, 12, 2), np.arange(1, 12, 2)]))
    heads = np.concatenate([order, 12 + order])

    def permuted(path, leaf):
        names = [key.key for key in path]
        if "q_proj" in names or "k_proj" in names:
            return leaf[..., heads]
        return leaf[..., order] if {"query_norm", "key_norm"} & set(names) else leaf

    given = batch(TINY)
    ours = jax.jit(pairs.__call__)(jax.tree_util.tree_map_with_path(permuted, params), **given)
    np.testing.assert_allclose(ours, forward(params, **given), atol=1e-5)


def test_rematerialising_some_blocks(tiny):
    """The first double block and every single one; the layers still follow one another in order."""
    _, params, forward = tiny
    cfg = dataclasses.replace(TINY, remat="full", remat_layers=(1, 100))
    some = Network.of(lambda rngs: mmdit.build(cfg, rngs=rngs))
    given = batch(TINY)
    assert str(jax.make_jaxpr(some.__call__)(params, **given)).count("remat2[") == 2
    np.testing.assert_allclose(jax.jit(some.__call__)(params, **given), forward(params, **given), atol=1e-6)


def test_mistakes_are_told(tiny):
    net, params, _ = tiny
    with pytest.raises(UserError, match="guidance_embed is False, but guidance is given"):
        net(params, **batch(TINY), guidance=jnp.ones(2))
    with pytest.raises(UserError, match="empty prompt"):
        net(params, **batch(TINY), drop_text=jnp.array([True, False]))
    with pytest.raises(UserError, match="5 x 6 do not split into patches of 2 x 2"):
        net(params, **batch(TINY, x=jnp.ones((2, 3, 5, 6, 2)), cond=None))
    with pytest.raises(UserError, match="must sum to"):
        dataclasses.replace(TINY, axes_dim=(4, 4, 6))


def test_names_of_diffusers_are_joined():
    """q, k and v of a stream become one tensor, scale and shift of the last layer change places."""
    split = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}
    theirs = {f"single_transformer_blocks.7.{part}.bias": np.full(2, i, np.float32) for part, i in split.items()}
    theirs |= {"norm_out.linear.weight": np.arange(8.0).reshape(4, 2), "unheard.of": np.zeros(3)}
    shapes = {name: array.shape for name, array in theirs.items()}
    joined = layouts.joined(shapes, table.JOINS)
    linear1, last = "single_blocks.7.linear1.bias", "final_layer.adaLN_modulation.1.weight"
    assert joined.shapes == {linear1: (8,), last: (4, 2), "unheard.of": (3,)}
    assert joined.origin(linear1) == "single_transformer_blocks.7.attn.to_q.bias"
    assert joined.origin("unheard.of") == "unheard.of"
    read = lambda name: joined.read(theirs.__getitem__, name)
    np.testing.assert_array_equal(read(linear1), [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(read(last), [[4, 5], [6, 7], [0, 1], [2, 3]])
    del shapes["single_transformer_blocks.7.attn.to_v.bias"]
    assert linear1 not in layouts.joined(shapes, table.JOINS).shapes
