"""The two transformer blocks of the DiT line: PixArt's (text through cross-attention, one timestep projection for all
layers; also both halves of STDiT3) and DiT's (no text tokens, a projection a layer; also Latte's)."""

import jax
from flax import nnx

from opensora_jax.nn.attention import CrossAttention, SelfAttention
from opensora_jax.nn.linear import Linear, zeros
from opensora_jax.nn.mlp import MLP
from opensora_jax.nn.modulate import gated, modulate, modulated_mlp, rows, table_rows
from opensora_jax.nn.norms import LayerNorm
from opensora_jax.parallel.shard import constrain

# How activations lie while attention looks along an axis, and otherwise.
LAYOUT = {"spatial": ("batch", "frames", None, None), "temporal": ("batch", None, "space", None)}
STREAM = ("batch", "frames", "space", None)
LAYOUT["full"] = STREAM  # tokens of all frames as one row [B, 1, T*S, C], shared out or not


def scale_shift_table(rows_, width, param_dtype, rngs):
    return nnx.Param(jax.random.normal(rngs.params(), (rows_, width), param_dtype) / width**0.5)


class TextBlock(nnx.Module):
    """Attention, cross-attention to text, MLP; attention and MLP are modulated and gated by table + timestep."""

    def __init__(self, attn, width, heads, mlp_ratio, *, init_cross=None, init_mlp=None, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attn = attn
        self.cross_attn = CrossAttention(width, heads, init_out=init_cross, **kwargs)
        self.mlp = MLP(width, int(width * mlp_ratio), init_out=init_mlp, **kwargs)
        self.norm1 = LayerNorm(width, affine=False)
        self.scale_shift_table = scale_shift_table(6, width, param_dtype, rngs)

    def __call__(self, x, attend, text, modulation, *, mode="spatial", keep=None):
        """x [B, T, S, C]; attend(attn, h) → h; text: arguments of the cross-attention; modulation [B, 1 or T, 6C];
        keep: drop-path factors [2, B] or None."""
        keep = (None, None) if keep is None else keep
        parts = table_rows(self.scale_shift_table[...], modulation)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        h = constrain(modulate(self.norm1(x), shift_msa, scale_msa), *LAYOUT[mode])
        h = constrain(attend(self.attn, h), *STREAM)
        x = x + gated(h, gate_msa, keep[0])
        x = self.cross_attn.onto(x, **text)
        return constrain(modulated_mlp(x, self.mlp, shift_mlp, scale_mlp, gate_mlp, keep[1]), *STREAM)


class ConditionBlock(nnx.Module):
    """Attention and MLP, modulated and gated by a projection of the condition that begins as zero (adaLN-Zero)."""

    def __init__(self, width, heads, mlp_ratio, *, mlp_norm_eps=1e-6, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attn = SelfAttention(width, heads, **kwargs)
        self.mlp = MLP(width, int(width * mlp_ratio), **kwargs)
        self.norm1 = LayerNorm(width, affine=False)
        self.mlp_norm_eps = mlp_norm_eps
        self.modulation = Linear(width, 6 * width, ("embed", None), init=zeros, **kwargs)

    def __call__(self, x, condition, *, mode="spatial", visible=None):
        """x [B, T, S, C]; condition [B, C], shared by all frames; visible: tokens that are no padding (mode "full")."""
        parts = rows(self.modulation(jax.nn.silu(condition))[:, None], 6)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        h = constrain(modulate(self.norm1(x), shift_msa, scale_msa), *LAYOUT[mode])
        x = x + gated(constrain(self.attn(h, mode=mode, visible=visible), *STREAM), gate_msa)
        x = modulated_mlp(x, self.mlp, shift_mlp, scale_mlp, gate_mlp, eps=self.mlp_norm_eps)
        return constrain(x, *STREAM)
