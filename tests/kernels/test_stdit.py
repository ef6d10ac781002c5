"""The fused entry against float64: both modes, norm, rotation in either order, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.kernels.stdit import ROW, stdit_attention
from opensora_jax.parallel import pieces
from tests.kernels.reference import stdit64

B, T, S, HEADS, DIM = 2, 5, 6, 2, 8


def inputs(mode, seed=0, b=B, t=T, s=S, heads=HEADS, dim=DIM):
    row = s if mode == "spatial" else t
    keys = jax.random.split(jax.random.key(seed), 5)
    angles = 3 * jax.random.normal(keys[3], (row, dim // 2)).repeat(2, axis=-1)
    return {
        "qkv": jax.random.normal(keys[0], (b, t, s, 3 * heads * dim)),
        "norm": {
            "q_scale": 1 + 0.3 * jax.random.normal(keys[1], (dim,)),
            "k_scale": 1 + 0.3 * jax.random.normal(keys[2], (dim,)),
        },
        "rope": {"rope": (jnp.cos(angles), jnp.sin(angles))},
        "mask": {"kv_mask": jax.random.bernoulli(keys[4], 0.6, (b, row)).at[:, 0].set(True)},
    }


@pytest.mark.parametrize("mode", ["spatial", "temporal"])
@pytest.mark.parametrize("parts", [(), ("norm",), ("rope",), ("norm", "rope"), ("norm", "rope", "mask")])
@pytest.mark.parametrize("norm_before_rope", [True, False])
def test_reference_matches_float64(mode, parts, norm_before_rope):
    given = inputs(mode)
    options = {"num_heads": HEADS, "mode": mode, "norm_before_rope": norm_before_rope}
    for part in parts:
        options |= given[part]
    out = stdit_attention(given["qkv"], implementation="xla", **options)
    assert out.shape == (B, T, S, HEADS * DIM)
    np.testing.assert_allclose(out, stdit64(given["qkv"], **options), rtol=0, atol=3e-6)


@pytest.mark.parametrize("mode, many", [("spatial", 3), ("temporal", 5)])
def test_rows_in_pieces_give_the_same(mode, many):
    given = inputs(mode)
    options = {"num_heads": HEADS, "mode": mode, **given["rope"], **given["mask"]}
    axis = ROW[mode]
    out = stdit_attention(pieces.cut(given["qkv"], many, axis), pieces=many, **options)
    assert out.shape[0] == many * B
    np.testing.assert_array_equal(pieces.join(out, many, axis), stdit_attention(given["qkv"], **options))


def test_wrong_arguments_are_refused_in_words():
    qkv = jnp.zeros((B, T, S, 3 * HEADS * DIM))
    with pytest.raises(ValueError, match="mode='diagonal' is unknown"):
        stdit_attention(qkv, num_heads=HEADS, mode="diagonal")
    with pytest.raises(ValueError, match="not 3 x 5 heads"):
        stdit_attention(qkv, num_heads=5)
    with pytest.raises(ValueError, match="cos has shape"):
        stdit_attention(qkv, num_heads=HEADS, rope=(jnp.zeros((T, DIM)),) * 2)
    with pytest.raises(ValueError, match="or neither"):
        stdit_attention(qkv, num_heads=HEADS, q_scale=jnp.ones(DIM))
