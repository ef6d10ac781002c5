"""Our Pallas kernels for attention on TPUs: cross-attention over short texts, and flash attention for whole-tile heads.

Both read [B, L, N*H] as projections write it: no transpose, no pad. Text keys (any head size up to 126) stay in fast
memory while queries stream past, hidden keys and samples without text included (cross_tpu.py, on the kernels of
stdit_tpu.py). Heads of 128 lanes, as in MMDiT, take the flash kernels of flash_tpu.py at any length.
"""

import jax.numpy as jnp

from opensora_jax.kernels import cross_tpu, flash_tpu, spec, tpu_channels
from opensora_jax.kernels.spec import Call, Unsupported, repeat
from opensora_jax.kernels.tpu_lanes import LANES, Heads


def supports(call: Call) -> None:
    if call.dtype not in ("bfloat16", "float32"):
        raise Unsupported(f"dtype {call.dtype}")
    if call.head_dim == LANES:
        return call.refuse("bias", "segment_ids", "causal", "kv_mask")
    call.refuse("bias", "segment_ids", "causal")
    Heads(call.heads, call.head_dim).check()
    tpu_channels.marks(Heads(call.heads, call.head_dim))
    if call.keys > cross_tpu.MAX_KEYS:
        raise Unsupported(f"{call.keys} keys of heads of {call.head_dim} are more than {cross_tpu.MAX_KEYS}")


def attention(
    q_btnh, k_bsnh, v_bsnh, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale
):
    b, t, n, h = q_btnh.shape
    s = k_bsnh.shape[1]
    interpret = spec.platform() != "tpu"
    if h == LANES:
        k_bsnh, v_bsnh, kv_lengths = repeat((k_bsnh, v_bsnh, kv_lengths), b)
    q, k, v = (x.reshape(*x.shape[:2], n * h) for x in (q_btnh, k_bsnh, v_bsnh))
    if h == LANES:
        lengths = jnp.full(b, s, jnp.int32) if kv_lengths is None else kv_lengths.astype(jnp.int32)
        out = flash_tpu.attend(q, k, v, lengths, heads=n, scale=float(scale), interpret=interpret)
    else:
        out = cross_tpu.attend(q, k, v, kv_lengths, kv_mask, Heads(n, h), float(scale), interpret)
    return out.reshape(q_btnh.shape)
