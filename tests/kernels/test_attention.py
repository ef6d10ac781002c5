"""The public functions against float64: every kind of case, optional input and mask, chunking, the choice of a back end."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_jax.kernels import attention as dispatch
from opensora_jax.kernels import cudnn, xla
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.kernels.stdit import stdit_attention
from opensora_jax.kernels.visible import visible_first
from tests.kernels.cases import BY_NAME
from tests.kernels.compare import both, check
from tests.kernels.reference import attention64, gradients64

B, T, S, N, H = 2, 10, 7, 3, 8


def draw(seed=0, dtype=jnp.float32, shape=(B, T, S, N, H)):
    b, t, s, n, h = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (b, length, n, h)).astype(dtype) for key, length in zip(keys, (t, s, s)))


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "lengths": {"kv_lengths": np.array([0, 5])},
    "mask": {"kv_mask": np.arange(B * S).reshape(B, S) % 3 != 0},
    "segments": {"segment_ids": (np.arange(B * T).reshape(B, T) % 4, np.arange(B * S).reshape(B, S) % 3)},
    "bias": {"bias": np.random.default_rng(0).normal(size=(1, N, T, S)).astype(np.float32)},
    "bias row": {"bias": np.random.default_rng(0).normal(size=(B, 1, 1, S)).astype(np.float32)},
    "causal": {"causal": True},
    "lengths and mask and bias": {
        "kv_lengths": np.array([3, 7]),
        "kv_mask": np.arange(B * S).reshape(B, S) % 2 == 0,
        "bias": np.random.default_rng(1).normal(size=(B, N, T, S)).astype(np.float32),
        "causal": True,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunked", [False, True])
def test_reference_matches_float64(name, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * B * N * S * 4)  # four queries at once: 10 = 4 + 4 + 2
    q, k, v = draw()
    out = attention(q, k, v, implementation="xla", **OPTIONS[name])
    np.testing.assert_allclose(out, attention64(q, k, v, **OPTIONS[name]), rtol=0, atol=2e-6)


KINDS = [  # one case of each kind in cases.py
    "v1.0 spatial 64x512",
    "v1.0 temporal T=16",
    "v1.0 cross 64x512 text 120",
    "v1.1 temporal T=16 360p",
    "v1.2 spatial 360p",
    "v1.2 temporal T=15 360p",
    "v1.3 window T=15",
    "v2.0 joint 256px",
    "CLIP text",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_and_its_gradients_match_float64(name, dtype):
    case = BY_NAME[name].small()
    check(case, dtype, functools.partial(stdit_attention if case.fused else attention, implementation="xla"))


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), st.data())
def test_any_shape_length_and_mask(queries, keys, causal, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    q, k, v, cotangent = (rng.normal(size=(2, n, 2, 8)).astype(np.float32) for n in (queries, keys, keys, queries))
    options = {"kv_lengths": np.array([data.draw(st.sampled_from([0, keys // 2])), keys]), "causal": causal}
    if data.draw(st.booleans()):
        options["kv_mask"] = rng.random((2, keys)) < 0.7
    if data.draw(st.booleans()):
        options["bias"] = rng.normal(size=(1, 2, queries, keys)).astype(np.float32)
    out, found = both(functools.partial(attention, implementation="xla", **options), cotangent, q, k, v)
    np.testing.assert_allclose(out, attention64(q, k, v, **options), rtol=0, atol=5e-6)
    for ours, exact in zip(found, gradients64(attention64, cotangent, {}, (q, k, v), **options)[1:]):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


def test_a_mask_becomes_lengths_when_visible_keys_come_first():
    q, k, v = draw(2, shape=(3, 6, 9, 2, 4))
    mask = np.random.default_rng(3).random((3, 9)) < 0.5
    mask[2] = False
    lengths = np.array([9, 4, 9])
    cotangent = jax.random.normal(jax.random.key(4), q.shape)

    def run(q, k, v):
        k, v, count = visible_first(k, v, mask, lengths)
        return attention(q, k, v, kv_lengths=count)

    out, found = both(run, cotangent, q, k, v)
    options = {"kv_mask": mask, "kv_lengths": lengths}
    np.testing.assert_allclose(out, attention64(q, k, v, **options), rtol=0, atol=2e-6)
    for ours, exact in zip(found, gradients64(attention64, cotangent, {}, (q, k, v), **options)[1:]):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=5e-6)


BLIND = np.array([[True, False, True, True, False, False, True], [False] * S])


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS["lengths"],
        OPTIONS["bias row"],
        {"kv_mask": BLIND},
        {"kv_mask": BLIND, "kv_lengths": np.array([6, 3])},
        {"kv_mask": BLIND, **OPTIONS["bias"]},
        {"causal": True, "kv_lengths": np.array([0, 5])},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_cudnn_is_told_means_the_same(options, monkeypatch):
    """jax's own implementation stands for cuDNN's: the same arguments, no GPU."""
    library = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **kwargs: library(*args, **kwargs | {"implementation": "xla"})
    )
    q, k, v = draw(5)
    cotangent = jax.random.normal(jax.random.key(6), q.shape)
    out, found = both(functools.partial(cudnn.attention, scale=H**-0.5, **options), cotangent, q, k, v)
    np.testing.assert_allclose(out, attention64(q, k, v, **options), rtol=0, atol=2e-6)
    for ours, exact in zip(found, gradients64(attention64, cotangent, {}, (q, k, v), **options)[1:]):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["lengths", "lengths and mask and bias"])
def test_chunked_gradients_match_whole(name, monkeypatch):
    q, k, v = draw(1)
    target = jax.random.normal(jax.random.key(9), q.shape)
    loss = lambda q, k, v: (attention(q, k, v, implementation="xla", **OPTIONS[name]) * target).sum()
    whole = jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * B * N * S * 3)
    chunks = jax.grad(loss, (0, 1, 2))(q, k, v)
    for a, b in zip(whole, chunks):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_long_sequences_do_not_hold_all_scores():
    shape = jax.ShapeDtypeStruct((1, 16384, 2, 8), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attention(q, k, v, implementation="xla")).lower(shape, shape, shape).compile()
    whole = 4 * 2 * 16384**2
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * whole


def test_hidden_rows_give_zeros_and_no_nan_gradients():
    q, k, v = draw()
    lengths = jnp.zeros(B, jnp.int32)
    run = lambda q, k, v: attention(q, k, v, kv_lengths=lengths, implementation="xla").sum()
    assert not attention(q, k, v, kv_lengths=lengths, implementation="xla").any()
    assert all(np.isfinite(g).all() for g in jax.grad(run, (0, 1, 2))(q, k, v))


def test_choice_is_logged_once_a_shape(caplog):
    dispatch._first_that_serves.cache_clear()
    q, k, v = draw()
    with caplog.at_level(logging.INFO, logger="opensora_jax.kernels"):
        attention(q, k, v)
        attention(q, k, v)
        attention(q[:, :5], k, v)
        jax.eval_shape(attention, *[jax.ShapeDtypeStruct((1, 16384, 2, 8), jnp.float32)] * 3)
    assert len(caplog.records) == 3
    assert f"attention {B}x{T}x{S} h{N} d{H} float32 on cpu: xla (first choice on cpu)" in caplog.text
    assert "xla (first choice on cpu; queries in chunks, all scores would take 2048 MiB)" in caplog.text


def test_unknown_back_end_and_bad_shapes_are_refused():
    q, k, v = draw()
    with pytest.raises(Unsupported, match="no back end is called 'magic'"):
        attention(q, k, v, implementation="magic")
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :3], v)
    with pytest.raises(ValueError, match="kv_lengths has shape"):
        attention(q, k, v, kv_lengths=jnp.ones(B + 1, jnp.int32))
    with pytest.raises(ValueError, match="does not broadcast"):
        attention(q, k, v, bias=jnp.zeros((1, N, T, S + 1)))
