"""Our GPU kernels in Pallas' interpreter against float64 and the reference's gradients; their lowering to Triton."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_jax.kernels import pallas_gpu, spec, stdit, stdit_gpu
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.kernels.stdit import stdit_attention
from tests.kernels.cases import BY_NAME, CASES
from tests.kernels.compare import FORWARD, GRADIENT, both, check, relative
from tests.kernels.reference import attention64, gradients64, stdit64

SMALL = tuple((stage, pallas_gpu.Blocks(16, 32, 4, 2)) for stage in ("forward", "dkv", "dq"))
FLASH = ["v1.0 cross 64x512 text 120", "v2.0 joint 256px", "CLIP text", "DiT image 512px"]
FUSED = ["v1.0 temporal T=16", "v1.1 temporal T=16 360p", "v1.2 temporal T=15 360p", "v1.3 window T=15"]


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_matches_float64(name, dtype):
    check(BY_NAME[name].small(), dtype, functools.partial(pallas_gpu.attention, blocks=SMALL))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_rows_match_float64(name, dtype):
    check(BY_NAME[name].small(), dtype, functools.partial(stdit_attention, implementation="pallas_gpu"))


SHAPES = (st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 24, 72]), st.booleans(), st.data())


def any_problem(queries, keys, head_dim, causal, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [rng.normal(size=(2, n, 1, head_dim)).astype(np.float32) for n in (queries, keys, keys, queries)]
    options = {"kv_lengths": np.array([data.draw(st.integers(0, keys)), keys]), "causal": causal}
    if data.draw(st.booleans()):
        options["kv_mask"] = rng.random((2, keys)) < 0.7
    if data.draw(st.booleans()):
        options["segment_ids"] = (rng.integers(0, 2, (2, queries)), rng.integers(0, 2, (2, keys)))
    return arrays, options


@settings(max_examples=5, deadline=None)
@given(*SHAPES)
def test_any_shape_length_and_mask(queries, keys, head_dim, causal, data):
    (q, k, v, _), options = any_problem(queries, keys, head_dim, causal, data)
    out = attention(q, k, v, implementation="pallas_gpu", **options)
    np.testing.assert_allclose(out, attention64(q, k, v, **options), rtol=0, atol=5e-6)


@settings(max_examples=2, deadline=None)
@given(*SHAPES)
def test_gradients_of_any_shape_length_and_mask(queries, keys, head_dim, causal, data):
    (q, k, v, cotangent), options = any_problem(queries, keys, head_dim, causal, data)
    _, found = both(functools.partial(attention, implementation="pallas_gpu", **options), cotangent, q, k, v)
    for ours, exact in zip(found, gradients64(attention64, cotangent, {}, (q, k, v), **options)[1:]):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


@settings(max_examples=2, deadline=None)
@given(
    st.integers(1, 33), st.integers(1, 9), st.sampled_from([8, 72]), st.sampled_from(["spatial", "temporal"]), st.data()
)
def test_any_fused_row_and_mask(row, rows, head_dim, mode, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    frames, positions = (row, rows) if mode == "temporal" else (rows, row)
    qkv, cotangent = (rng.normal(size=(2, frames, positions, n * head_dim)).astype(np.float32) for n in (3, 1))
    options = {"num_heads": 1, "mode": mode}
    norm = {}
    if data.draw(st.booleans()):
        options["kv_mask"] = rng.random((2, row)) < 0.6
    if data.draw(st.booleans()):
        norm = {name: rng.normal(size=head_dim).astype(np.float32) for name in ("q_scale", "k_scale")}
    run = lambda norm, qkv: stdit_attention(qkv, implementation="pallas_gpu", **norm, **options)
    out, found = both(run, cotangent, norm, qkv)
    assert relative(out, stdit64(qkv, **norm, **options)) < FORWARD["float32"]
    expected = gradients64(stdit64, cotangent, norm, (qkv,), **options)
    for ours, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(ours, exact) < GRADIENT["float32"]


def _hopper():
    """Lowering for a Hopper GPU; jax 0.11 wants to know which one."""
    kinds = {"device_kind": "NVIDIA H200", "num_cores": None}
    try:
        device = jax.sharding.AbstractDevice(**kinds, platform="cuda")
    except (AttributeError, TypeError):
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",)))
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_lowers_to_triton(case):
    small = case.small()
    extras = small.inputs()[1]
    public = functools.partial(stdit_attention if case.fused else attention, implementation="pallas_gpu", **extras)
    shapes = jax.eval_shape(lambda: small.inputs()[0])

    def both(*arrays):
        out, pull = jax.vjp(public, *arrays)
        return out, pull(out)

    with spec.target("hopper"), _hopper():
        text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") >= 2


def test_rows_that_do_not_fit_a_tile_are_refused_with_the_reason():
    call = spec.Call("temporal", 4, 200, 200, 2, 72, "bfloat16")
    with pytest.raises(Unsupported, match="rows of 200 tokens"):
        stdit_gpu.supports(call)
    with pytest.raises(Unsupported, match=r"pallas_gpu cannot serve .*bias not served"):
        attention(*(jnp.zeros((1, 4, 1, 8)),) * 3, bias=jnp.zeros((1, 1, 4, 4)), implementation="pallas_gpu")
    with pytest.raises(Unsupported, match=r"cudnn cannot serve .* needs an NVIDIA GPU"):
        stdit.stdit_attention(jnp.zeros((1, 4, 4, 24), jnp.bfloat16), num_heads=1, implementation="cudnn")


def test_the_library_serves_what_it_can_and_says_what_it_cannot():
    from opensora_jax.kernels import cudnn

    with spec.target("cuda"):
        for served in ("kv_lengths", "kv_mask"):
            cudnn.supports(spec.Call("attention", 4, 16384, 300, 16, 72, "bfloat16", frozenset({served})))
        for call, reason in {
            spec.Call("attention", 2, 64, 64, 4, 72, "float32"): "not float32",
            spec.Call("attention", 2, 64, 64, 4, 36, "bfloat16"): "multiple of 8",
            spec.Call(
                "attention", 2, 64, 64, 4, 64, "bfloat16", frozenset({"kv_mask", "causal"})
            ): "mask beside causal",
            spec.Call("attention", 2, 9000, 9000, 4, 72, "bfloat16", frozenset({"bias"})): "more than 64 MiB",
        }.items():
            with pytest.raises(Unsupported, match=reason):
                cudnn.supports(call)
