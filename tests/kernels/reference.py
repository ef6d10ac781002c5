"""Attention in NumPy float64, written for clarity: what every back end is compared with."""

import numpy as np


def attention64(q, k, v, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    queries, keys = q.shape[1], k.shape[1]
    logits = np.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    visible = np.ones(logits.shape, bool)
    if kv_lengths is not None:
        visible &= (np.arange(keys) < np.asarray(kv_lengths)[:, None])[:, None, None, :]
    if kv_mask is not None:
        visible &= np.asarray(kv_mask)[:, None, None, :]
    if segment_ids is not None:
        visible &= (np.asarray(segment_ids[0])[:, :, None] == np.asarray(segment_ids[1])[:, None, :])[:, None]
    if causal:
        visible &= np.arange(queries)[:, None] >= np.arange(keys)
    logits = np.where(visible, logits, -np.inf)
    peak = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - peak)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnts,bsnh->btnh", weights, v)


def stdit64(qkv, *, num_heads, mode, q_scale=None, k_scale=None, rope=None, norm_before_rope=True, kv_mask=None):
    qkv = np.asarray(qkv, np.float64)
    b, t, s, c3 = qkv.shape
    q, k, v = np.moveaxis(qkv.reshape(b, t, s, 3, num_heads, -1), 3, 0)
    if mode == "temporal":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def norm(x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale, np.float64)

    def rotate(x):
        cos, sin = (np.asarray(table, np.float64)[:, None, :] for table in rope)
        turned = np.empty_like(x)
        turned[..., 0::2], turned[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return x * cos + turned * sin

    def prepare(x, scale):
        if scale is not None and norm_before_rope:
            x = norm(x, scale)
        if rope is not None:
            x = rotate(x)
        return x if scale is None or norm_before_rope else norm(x, scale)

    rows = lambda x: x.reshape(-1, *x.shape[2:])
    mask = None if kv_mask is None else np.repeat(np.asarray(kv_mask), q.shape[1], axis=0)
    out = attention64(rows(prepare(q, q_scale)), rows(prepare(k, k_scale)), rows(v), kv_mask=mask)
    out = out.reshape(*q.shape[:3], c3 // 3)
    return out.swapaxes(1, 2) if mode == "temporal" else out
