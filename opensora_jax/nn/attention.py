"""Attention modules of the STDiT family: fused-qkv self-attention and text cross-attention.

The mathematics is in kernels/; here are the projections, the q/k norms and the parameter names.
"""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from opensora_jax.kernels import modulated
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.full import full_attention, shares
from opensora_jax.kernels.stdit import stdit_attention
from opensora_jax.nn.linear import Linear, xavier
from opensora_jax.nn.norms import RMSNorm


class SelfAttention(nnx.Module):
    """qkv projection [3, heads, head_dim], optional RMS q/k norm, attention, projection.

    "spatial" attends within each frame, "temporal" along time at each position, over [B, T, S, C]; "full" over all
    tokens, [B, 1, S, C], also where they are shared out (kernels/full.py).
    """

    def __init__(
        self,
        features,
        heads,
        *,
        qkv_bias=True,
        qk_norm=False,
        norm_before_rope=True,
        init_out=None,
        dtype,
        param_dtype,
        rngs,
    ):
        if features % heads:
            raise ValueError(f"hidden size {features} does not split into {heads} heads")
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.heads, self.norm_before_rope = heads, norm_before_rope
        self.qkv = Linear(features, 3 * features, ("embed", "heads"), bias=qkv_bias, **kwargs)
        self.proj = Linear(features, features, ("heads", "embed"), init=init_out or xavier, **kwargs)
        self.q_norm = RMSNorm(features // heads, param_dtype=param_dtype) if qk_norm else None
        self.k_norm = RMSNorm(features // heads, param_dtype=param_dtype) if qk_norm else None

    def __call__(
        self, x_btsc, *, mode: str, rope=None, kv_mask=None, visible=None, modulation=None, gate=None, pieces=1
    ):
        """visible: [S] numpy bool, tokens that are no padding (mode "full"). modulation: (shift, scale), each [B, 1 or T,
        1, C], where x is the bare stream: it is normalised (no weights, eps 1e-6) and modulated first. Without a scale
        it is only shifted. gate: with a modulation, for x + gate · result. pieces: of the rows that are attended over,
        x_btsc being [pieces * B, ...] (parallel/pieces.py)."""
        name = "spatial_out" if mode == "spatial" else "attention_out"
        if mode == "full" and shares() > 1:
            out = full_attention(*self.project(x_btsc[:, 0]), visible=visible).reshape(x_btsc.shape)
            out = checkpoint_name(out, name)
        else:
            qkv, x_btsc = (self.qkv(x_btsc), x_btsc) if modulation is None else self._modulated_qkv(x_btsc, *modulation)
            out = stdit_attention(
                qkv,
                num_heads=self.heads,
                mode="spatial" if mode == "full" else mode,
                q_scale=None if self.q_norm is None else self.q_norm.scale[...],
                k_scale=None if self.k_norm is None else self.k_norm.scale[...],
                rope=rope,
                norm_before_rope=self.norm_before_rope,
                kv_mask=kv_mask,
                pieces=pieces,
                name=name,
            )
        return self.proj(out) if gate is None else project_onto(x_btsc, gate, self.proj, out)

    def _modulated_qkv(self, x_btsc, shift, scale):
        kernel = self.qkv.kernel[...]
        bias = jnp.zeros(kernel.shape[1], kernel.dtype) if self.qkv.bias is None else self.qkv.bias[...]
        qkv, x_btsc = modulated.linear(x_btsc, shift, scale, kernel, bias)
        return checkpoint_name(qkv, "product"), x_btsc

    def project(self, x_bnc):
        """q, k, v [B, N, heads, head_dim], q and k normalised; without rotation."""
        q, k, v = (part.reshape(*x_bnc.shape[:2], self.heads, -1) for part in jnp.split(self.qkv(x_bnc), 3, -1))
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)


class CrossAttention(nnx.Module):
    """Queries from video [B, N, C], keys and values from text [B, L, C]; text_mask [B, L], 1 = keep.
    segments: ids of video [B, N] and text [B, L] tokens, where some frames may see one part of the text only. Video may
    come in pieces [pieces * B, N, C] (parallel/pieces.py)."""

    def __init__(self, features, heads, *, init_out=None, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.heads = heads
        self.q_linear = Linear(features, features, ("embed", "heads"), **kwargs)
        self.kv_linear = Linear(features, 2 * features, ("embed", "heads"), **kwargs)
        self.proj = Linear(features, features, ("heads", "embed"), init=init_out or xavier, **kwargs)

    def __call__(self, x, y, text_mask=None, segments=None):
        return self.proj(checkpoint_name(self._attend(self.q_linear(x), y, text_mask, segments), "attention_out"))

    def onto(self, x_btsc, y, text_mask=None, segments=None):
        """x + result."""
        q, x_btsc = modulated.linear(x_btsc, None, None, self.q_linear.kernel[...], self.q_linear.bias[...])
        q = checkpoint_name(q, "product")
        out = self._attend(q.reshape(x_btsc.shape[0], -1, q.shape[-1]), y, text_mask, segments)
        return project_onto(x_btsc, None, self.proj, out.reshape(x_btsc.shape), "attention_out")

    def _attend(self, q, y, text_mask, segments):
        split = lambda a: a.reshape(*a.shape[:-1], self.heads, -1)
        k, v = (split(part) for part in jnp.split(self.kv_linear(y), 2, axis=-1))
        mask = None if text_mask is None else text_mask.astype(bool)
        out = attention(split(q), k, v, kv_mask=mask, segment_ids=segments)
        return out.reshape(q.shape)


def project_onto(x, gate, linear, out, name=None):
    """x + gate · linear(out); the gate may be None. name: of `out` for remat policies, if it has none yet."""
    x = modulated.project(x, out, gate, linear.kernel[...], linear.bias[...], name=name)
    return checkpoint_name(x, "product")
