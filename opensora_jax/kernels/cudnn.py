"""cuDNN's flash attention through jax.nn, in half precision on NVIDIA GPUs (sm80 and later)."""

import jax
import jax.numpy as jnp

from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.visible import visible_first
from opensora_jax.kernels.xla import key_visibility

MAX_BIAS_BYTES = 1 << 26  # a bias is written out for cuDNN, all heads and samples: above this another back end serves


def supports(call: Call) -> None:
    if spec.platform() != "cuda":
        raise Unsupported("needs an NVIDIA GPU")
    if call.dtype not in ("bfloat16", "float16"):
        raise Unsupported(f"serves bfloat16 and float16, not {call.dtype}")
    if call.head_dim % 8 or call.head_dim > (256 if spec.chip() == "hopper" else 128):
        raise Unsupported(f"head_dim {call.head_dim} is not a multiple of 8 within its limit")
    call.refuse("segment_ids")
    if {"kv_mask", "causal"} <= call.extras:
        raise Unsupported("a mask beside causal order is not served: a query may see no key at all")
    if "bias" in call.extras and 2 * call.batch * call.heads * call.queries * call.keys > MAX_BIAS_BYTES:
        raise Unsupported(f"would write a bias of more than {MAX_BIAS_BYTES >> 20} MiB to memory")


def attention(
    q_btnh, k_bsnh, v_bsnh, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale
):
    """A sample without visible keys is computed with one key and then zeroed: cuDNN leaves it undefined."""
    batch, queries, heads, _ = q_btnh.shape
    keys = k_bsnh.shape[1]
    arguments = {"scale": scale, "is_causal": causal, "implementation": "cudnn"}
    if kv_mask is not None and bias is None:
        k_bsnh, v_bsnh, kv_lengths = visible_first(k_bsnh, v_bsnh, kv_mask, kv_lengths)
    elif kv_mask is not None:  # a bias belongs to its key's place: the mask joins it
        visible = key_visibility(keys, kv_lengths, kv_mask)
        bias = jnp.where(visible[:, None, None, :], bias, jnp.finfo(q_btnh.dtype).min / 2)
        kv_lengths = jnp.where(visible.any(-1), keys, 0)
    if kv_lengths is not None:
        arguments["key_value_seq_lengths"] = jnp.clip(kv_lengths.astype(jnp.int32), 1, keys)
        arguments["query_seq_lengths"] = jnp.full((batch,), queries, jnp.int32)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (batch, heads, queries, keys)).astype(q_btnh.dtype)
    out = jax.nn.dot_product_attention(q_btnh, k_bsnh, v_bsnh, bias, **arguments)
    return out if kv_lengths is None else jnp.where((kv_lengths > 0)[:, None, None, None], out, 0).astype(out.dtype)
