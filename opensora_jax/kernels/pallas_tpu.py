"""Our Pallas kernels for attention on TPUs: cross-attention over short texts, and flash attention over any number of keys.

Text keys (up to 1024, heads of up to 126 that fill whole tiles) stay in fast memory while queries stream past, read as
projections write them, hidden keys and samples without text included (cross_tpu.py, on the kernels of stdit_tpu.py). All
else takes the flash kernels of flash_tpu.py, heads of 128 without a copy, as in MMDiT, but under a mask.
"""

import jax.numpy as jnp

from opensora_jax.kernels import cross_tpu, flash_tpu, spec, tpu_channels, xla
from opensora_jax.kernels.spec import Call, Unsupported, repeat
from opensora_jax.kernels.tpu_lanes import LANES, Heads
from opensora_jax.kernels.visible import visible_first


def supports(call: Call) -> None:
    if call.dtype not in ("bfloat16", "float32"):
        raise Unsupported(f"dtype {call.dtype}")
    call.refuse("bias", "segment_ids", "causal")
    if call.head_dim > LANES:
        raise Unsupported(f"heads of {call.head_dim} are wider than {LANES} lanes")
    if call.head_dim == LANES:
        return
    # Splitting heads of 72 and small programs cost more than XLA's scores do where these are few. Forward and backward, two
    # heads, as many scores in all, v6e, XLA's cycles and static schedules, 2026-11-29: 0.80 ms by XLA and 1.94 here over 256
    # keys, 0.54 and 0.95 over 512, 0.43 and 0.54 over 1024. In chunks XLA takes five times what these kernels take.
    few = call.keys <= cross_tpu.MAX_KEYS and xla.score_bytes(call) <= xla.MAX_SCORE_BYTES
    if few and not _stays(call.keys, Heads(call.heads, call.head_dim)):
        raise Unsupported(f"{call.keys} keys are few, and {call.heads} heads of {call.head_dim} no whole tiles")


def _stays(keys: int, heads: Heads) -> bool:
    """Do the keys stay in fast memory, all heads of them?"""
    try:
        heads.check()
        tpu_channels.marks(heads)
    except Unsupported:
        return False
    return keys <= cross_tpu.MAX_KEYS


def attention(
    q_btnh, k_bsnh, v_bsnh, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale
):
    b, t, n, h = q_btnh.shape
    s = k_bsnh.shape[1]
    heads, interpret = Heads(n, h), spec.platform() != "tpu"
    flat = lambda x: x.reshape(*x.shape[:2], n * h)
    if _stays(s, heads):
        q, k, v = map(flat, (q_btnh, k_bsnh, v_bsnh))
        return cross_tpu.attend(q, k, v, kv_lengths, kv_mask, heads, float(scale), interpret).reshape(q_btnh.shape)
    k_bsnh, v_bsnh, kv_lengths, kv_mask = repeat((k_bsnh, v_bsnh, kv_lengths, kv_mask), b)
    if kv_mask is not None and h == LANES:  # no lane is left that could hide a key
        k_bsnh, v_bsnh, kv_lengths = visible_first(k_bsnh, v_bsnh, kv_mask, kv_lengths)
        kv_mask = None
    lengths = jnp.full(b, s, jnp.int32) if kv_lengths is None else kv_lengths.astype(jnp.int32)
    q, k, v = map(flat, (q_btnh, k_bsnh, v_bsnh))
    out = flash_tpu.attend(q, k, v, lengths, kv_mask, heads=heads, scale=float(scale), interpret=interpret)
    return out.reshape(q_btnh.shape)
