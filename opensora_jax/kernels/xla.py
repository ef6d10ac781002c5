"""The reference back end: plain jax.numpy, any shape, float32 softmax.

Scores of more than `MAX_SCORE_BYTES` are never held at once: queries go through in chunks whose scores are recomputed
in the backward pass, so memory grows with the chunk, not with queries x keys.
"""

import math

import jax
import jax.numpy as jnp

from opensora_jax.kernels.spec import Call
from opensora_jax.parallel import shard

MAX_SCORE_BYTES = 1 << 28  # float32 scores that may exist at once on a device (all heads and samples)
HIDDEN = -1e30  # finite, so that a row without visible keys stays free of NaN


def supports(call: Call) -> None:
    """Everything."""


def score_bytes(call: Call) -> int:
    """On a device."""
    return 4 * call.batch * call.heads * call.queries * call.keys // sharing(call.batch)


def attention(
    q_btnh, k_bsnh, v_bsnh, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale
):
    batch, queries, heads, _ = q_btnh.shape
    keys = k_bsnh.shape[1]
    visible_bs = key_visibility(keys, kv_lengths, kv_mask)
    q_ids, kv_ids = segment_ids if segment_ids is not None else (None, None)

    def chunk(rows):
        q, ids, positions, bias_rows = rows
        mask = None if visible_bs is None else visible_bs[:, None, None, :]
        if ids is not None:
            mask = _both(mask, ids[:, None, :, None] == kv_ids[:, None, None, :])
        if causal:
            mask = _both(mask, positions[None, None, :, None] >= jnp.arange(keys))
        return _attend(q, k_bsnh, v_bsnh, scale, mask, bias if bias_rows is None else bias_rows)

    positions = jnp.arange(queries)
    row_bias = bias is not None and bias.shape[-2] != 1
    rows_at_once = max(1, sharing(batch) * MAX_SCORE_BYTES // (4 * batch * heads * keys))
    if rows_at_once >= queries:
        return chunk((q_btnh, q_ids, positions, None))
    pieces = -(-queries // rows_at_once)
    size = -(-queries // pieces)

    def split(x, axis):
        if x is None:
            return None
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, pieces * size - queries)
        shape = x.shape[:axis] + (pieces, size) + x.shape[axis + 1 :]
        return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)

    rows = (split(q_btnh, 1), split(q_ids, 1), split(positions, 0), split(bias, 2) if row_bias else None)
    out = jax.lax.map(jax.checkpoint(chunk), rows)
    return jnp.moveaxis(out, 0, 1).reshape(batch, pieces * size, heads, -1)[:, :queries]


def sharing(batch: int) -> int:
    """Devices that share the samples out, where this is traced for all of them."""
    where, manual = shard.current(), shard.manual_axes()
    ways = 1 if where is None else math.prod(where.sizes[a] for a in where.axes_of("batch") if a not in manual)
    return math.gcd(ways, batch)


def key_visibility(keys, kv_lengths, kv_mask):
    """[B, S] bool from lengths and mask together, or None when every key is visible."""
    visible = None if kv_mask is None else kv_mask.astype(bool)
    if kv_lengths is not None:
        visible = _both(visible, jnp.arange(keys) < kv_lengths[:, None])
    return visible


def _both(mask, other):
    return other if mask is None else mask & other


def _attend(q, k, v, scale, mask, bias):
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is None:
        weights = jax.nn.softmax(logits, -1)
    else:
        logits = jnp.where(mask, logits, HIDDEN)
        peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def rms_norm(x, scale, eps=1e-6):
    """Over the last axis in float32; returns float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale.astype(jnp.float32)


def rotate_pairs(x, cos, sin):
    """Rotary embedding of the pairs (x0, x1), (x2, x3), ... in float32; the tables broadcast against x."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
    return x * cos + turned * sin


def prepare(x_rlnh, scale, rope, norm_before_rope):
    """q or k as attention wants it: normalised over the head and rotated, in the dtype it came in."""
    steps = [] if scale is None else [lambda x: rms_norm(x, scale)]
    if rope is not None:
        cos, sin = (table.astype(jnp.float32)[:, None, :] for table in rope)
        steps.insert(len(steps) if norm_before_rope else 0, lambda x: rotate_pairs(x, cos, sin))
    x = x_rlnh
    for step in steps:
        x = step(x).astype(x_rlnh.dtype)
    return x
