"""Full attention over shared-out tokens: every method equals attention on one device, gradients included."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.kernels import cross_tpu, full, xla
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh

SHAPE = (2, 48, 8, 4)  # B, T, N, H
VISIBLE = {"all": None, "a short end": np.arange(48) < 41, "a hole": (np.arange(48) < 11) | (np.arange(48) > 23)}


def layout_of(width, attention=""):
    mesh = make_mesh(MeshConfig(data=-1, context=width))
    return shard.layout(mesh, "fsdp_context", attention)


def value_and_gradients(visible):
    def run(q, k, v, cotangent):
        attend = lambda *qkv: full.full_attention(*qkv, visible=visible)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    return run


@pytest.fixture(scope="module")
def arrays():
    return [jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0), 4)]


@pytest.fixture(scope="module")
def expected(arrays):
    every = lambda *given: {name: value_and_gradients(visible)(*given) for name, visible in VISIBLE.items()}
    return jax.device_get(jax.jit(every)(*arrays))


@pytest.mark.parametrize("width", [2, 4, 8])
def test_every_method_equals_one_device(arrays, expected, width, monkeypatch):
    monkeypatch.setattr(xla, "MAX_SCORE_BYTES", 4 * 2 * 8 * 48 * 48 // width**2 // 3)  # queries go in three pieces

    def every(*given):
        found = {}
        for method in shard.ATTENTION:
            monkeypatch.setattr(shard, "current", lambda method=method: replace(where, attention=method))
            found[method] = {name: value_and_gradients(visible)(*given) for name, visible in VISIBLE.items()}
        return found

    with shard.use(layout_of(width)) as where:
        placed = [jax.device_put(x, where.sharding(("batch", "tokens", None, None), x.shape)) for x in arrays]
        compiled = jax.jit(every).lower(*placed).compile()
        found = jax.device_get(compiled(*placed))
    text = compiled.as_text()
    assert all(op in text for op in ("all-to-all(", "all-gather(", "collective-permute("))
    for method, cases in found.items():
        for name, ours in cases.items():
            for label, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, expected[name]):
                np.testing.assert_allclose(a, b, rtol=0, atol=3e-5, err_msg=f"{method}, {name}: {label}")


@pytest.mark.parametrize("method", ["heads", "gather"])
def test_a_device_attends_by_the_kernel_of_a_tpu(method, arrays, expected, monkeypatch):
    """Two heads of 4 a device fill no tile; padding at the end is hidden."""
    monkeypatch.setattr(cross_tpu, "MAX_KEYS", 16)
    monkeypatch.setattr(full, "attention", functools.partial(full.attention, implementation="pallas_tpu"))
    with shard.use(layout_of(4, method)) as where:
        placed = [jax.device_put(x, where.sharding(("batch", "tokens", None, None), x.shape)) for x in arrays]
        run = jax.jit(value_and_gradients(VISIBLE["a short end"]))
        assert "flash_tpu_backward" in str(run.trace(*placed).jaxpr)
        found = jax.device_get(run(*placed))
    for a, b in zip(found, expected["a short end"]):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("shape", "width", "cut_heads", "pinned", "method"),
    [
        ((1, 1024, 16, 72), 8, 1, "", "heads"),
        ((1, 1024, 24, 128), 8, 2, "", "gather"),  # 12 heads a device do not divide
        ((1, 1024, 24, 128), 16, 1, "", "gather"),
        ((4, 76800, 24, 128), 16, 1, "", "ring"),  # 3.8 GB of keys and values
        ((4, 76800, 24, 128), 8, 1, "gather", "gather"),
        ((1, 1024, 16, 72), 8, 1, "ring", "ring"),
    ],
)
def test_the_choice(shape, width, cut_heads, pinned, method):
    assert full.choose(shape, width, cut_heads, 2, pinned) == method


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(
        UserError, match="16 heads cannot be shared out over 32 devices; choose gather or ring"
    ) as caught:
        full.choose((1, 64, 16, 72), 32, 1, 2, "heads")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"mesh\.attention='rings' is unknown; choose one of heads, gather, ring"):
        layout_of(2, "rings")


def test_padding():
    x = jnp.ones((2, 13, 3))
    same, every = full.pad_to_shares(x, 1)
    assert same is x and every.all() and len(every) == 13
    with shard.use(layout_of(8)):
        padded, real = full.pad_to_shares(x, 1)
    assert padded.shape == (2, 16, 3) and real.sum() == 13 and padded.sum() == x.sum()
