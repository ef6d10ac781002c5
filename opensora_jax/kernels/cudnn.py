"""cuDNN's flash attention through jax.nn, in half precision on NVIDIA GPUs (sm80 and later)."""

import jax
import jax.numpy as jnp

from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.xla import key_visibility

MAX_MASK_BYTES = 1 << 26  # arbitrary masks and biases are materialised for cuDNN: above this another back end serves


def supports(call: Call) -> None:
    if spec.platform() != "cuda":
        raise Unsupported("needs an NVIDIA GPU")
    if call.dtype not in ("bfloat16", "float16"):
        raise Unsupported(f"serves bfloat16 and float16, not {call.dtype}")
    if call.head_dim % 8 or call.head_dim > (256 if spec.chip() == "hopper" else 128):
        raise Unsupported(f"head_dim {call.head_dim} is not a multiple of 8 within its limit")
    call.refuse("segment_ids")
    if call.extras & {"bias", "kv_mask"} and 2 * call.batch * call.heads * call.queries * call.keys > MAX_MASK_BYTES:
        raise Unsupported("would write the whole mask or bias to memory")


def attention(
    q_btnh, k_bsnh, v_bsnh, *, kv_lengths=None, kv_mask=None, segment_ids=None, bias=None, causal=False, scale
):
    """A sample without visible keys is computed with one key and then zeroed: cuDNN leaves it undefined."""
    batch, queries, heads, _ = q_btnh.shape
    keys = k_bsnh.shape[1]
    arguments = {"scale": scale, "is_causal": causal, "implementation": "cudnn"}
    seen = None
    if kv_lengths is not None:
        lengths = kv_lengths.astype(jnp.int32)
        seen = lengths > 0
        arguments["key_value_seq_lengths"] = jnp.clip(lengths, 1, keys)
        arguments["query_seq_lengths"] = jnp.full((batch,), queries, jnp.int32)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (batch, heads, queries, keys)).astype(q_btnh.dtype)
    if kv_mask is not None:
        visible = key_visibility(keys, kv_lengths, kv_mask)
        seen = visible.any(-1)
        arguments["mask"] = kv_mask.astype(bool)[:, None, None, :]
    out = jax.nn.dot_product_attention(q_btnh, k_bsnh, v_bsnh, bias, **arguments)
    return out if seen is None else jnp.where(seen[:, None, None, None], out, jnp.zeros((), out.dtype))
