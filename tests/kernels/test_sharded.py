"""Kernels under a mesh of eight fake devices: values and gradients equal those without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.kernels import cross_tpu, xla
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.stdit import stdit_attention
from opensora_jax.parallel import shard


@pytest.fixture(scope="module")
def layout():
    mesh = jax.make_mesh(
        (2, 2, 2, 1), ("data", "fsdp", "context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 4
    )
    return shard.layout(mesh, "fsdp_context")


def both(run, cotangent, *arrays):
    out, pull = jax.vjp(run, *arrays)
    return out, pull(cotangent)


@pytest.mark.parametrize("mode", ["spatial", "temporal"])
def test_fused_rows(mode, layout):
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = jax.random.normal(keys[0], (4, 6, 8, 3 * 2 * 16))
    weights = [1 + 0.3 * jax.random.normal(key, (16,)) for key in keys[1:3]]
    cotangent = jax.random.normal(keys[3], (4, 6, 8, 32))

    def run(pinned):
        call = lambda x, a, b: stdit_attention(x, num_heads=2, mode=mode, q_scale=a, k_scale=b, implementation=pinned)
        return jax.jit(lambda *arrays: both(call, *arrays))(cotangent, qkv, *weights)

    expected = run("xla")
    with shard.use(layout):
        found = run("pallas_gpu")
    assert len(found[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_plain_attention(implementation, layout, monkeypatch):
    monkeypatch.setattr(cross_tpu, "MAX_KEYS", 4)  # keys that stay in fast memory: these take flash attention
    keys = jax.random.split(jax.random.key(1), 4)
    q, cotangent = (jax.random.normal(key, (4, 8, 2, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (4, 5, 2, 16)) for key in keys[2:])
    lengths = jnp.array([0, 2, 3, 5])

    def run(pinned):
        call = lambda q, k, v: attention(q, k, v, kv_lengths=lengths, implementation=pinned)
        return jax.jit(lambda *arrays: both(call, *arrays))(cotangent, q, k, v)

    expected = run("xla")
    with shard.use(layout):
        found = run(implementation)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_device_counts_its_own_scores(layout, monkeypatch):
    """Four of the eight devices share the samples out: three queries of a quarter of them fit, not of all."""
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 3 * (4 * 4 * 2 * 6) // 4)
    x = jax.ShapeDtypeStruct((4, 6, 2, 8), jnp.float32)
    pieces = lambda: str(jax.make_jaxpr(lambda q: attention(q, q, q, implementation="xla"))(x))
    assert "length=6" in pieces()
    with shard.use(layout):
        assert "length=2" in pieces()
