"""Attention in float64, written for clarity: what every back end is compared with, forward (NumPy) and backward (jax)."""

import jax
import jax.numpy as jnp
import numpy as np


def attention64(
    q, k, v, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale=None, xp=np
):
    q, k, v = (xp.asarray(x, xp.float64) for x in (q, k, v))
    queries, keys = q.shape[1], k.shape[1]
    logits = xp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + xp.asarray(bias, xp.float64)
    visible = np.ones(logits.shape, bool)
    if kv_lengths is not None:
        visible &= (np.arange(keys) < np.asarray(kv_lengths)[:, None])[:, None, None, :]
    if kv_mask is not None:
        visible &= np.asarray(kv_mask)[:, None, None, :]
    if segment_ids is not None:
        visible &= (np.asarray(segment_ids[0])[:, :, None] == np.asarray(segment_ids[1])[:, None, :])[:, None]
    if causal:
        visible &= np.arange(queries)[:, None] >= np.arange(keys)
    blind = ~visible.any(-1, keepdims=True)  # sees no key: zeros
    logits = xp.where(visible, logits, xp.where(blind, 0.0, -xp.inf))
    weights = xp.exp(logits - logits.max(-1, keepdims=True))
    weights = xp.where(blind, 0.0, weights / weights.sum(-1, keepdims=True))
    return xp.einsum("bnts,bsnh->btnh", weights, v)


def stdit64(qkv, *, num_heads, mode, q_scale=None, k_scale=None, rope=None, norm_before_rope=True, kv_mask=None, xp=np):
    qkv = xp.asarray(qkv, xp.float64)
    b, t, s, c3 = qkv.shape
    q, k, v = xp.moveaxis(qkv.reshape(b, t, s, 3, num_heads, -1), 3, 0)
    if mode == "temporal":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def norm(x, scale):
        return x / xp.sqrt(xp.square(x).mean(-1, keepdims=True) + 1e-6) * xp.asarray(scale, xp.float64)

    def rotate(x):
        cos, sin = (np.asarray(table, np.float64)[:, None, :] for table in rope)
        turned = xp.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
        return x * cos + turned * sin

    def prepare(x, scale):
        if scale is not None and norm_before_rope:
            x = norm(x, scale)
        if rope is not None:
            x = rotate(x)
        return x if scale is None or norm_before_rope else norm(x, scale)

    rows = lambda x: x.reshape(-1, *x.shape[2:])
    mask = None if kv_mask is None else np.repeat(np.asarray(kv_mask), q.shape[1], axis=0)
    out = attention64(rows(prepare(q, q_scale)), rows(prepare(k, k_scale)), rows(v), kv_mask=mask, xp=xp)
    out = out.reshape(*q.shape[:3], c3 // 3)
    return out.swapaxes(1, 2) if mode == "temporal" else out


def gradients64(exact, cotangent, norm: dict, arrays: tuple, **options):
    """Gradients of the norm's weights (may be none) and of the arrays."""
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    run = lambda norm, *arrays: exact(*arrays, **norm, **options, xp=jnp)
    with jax.enable_x64(True):
        pull = jax.jit(lambda cotangent, norm, *arrays: jax.vjp(run, norm, *arrays)[1](cotangent))
        return jax.tree.map(np.asarray, pull(wide(cotangent), wide(norm), *wide(arrays)))
