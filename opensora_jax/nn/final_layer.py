"""The last layers: modulation by the timestep and a projection to patches."""

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.nn.linear import Linear, xavier, zeros
from opensora_jax.nn.modulate import modulate, rows, table_rows
from opensora_jax.nn.norms import LayerNorm


class T2IFinalLayer(nnx.Module):
    """PixArt and STDiT (adaLN-single): x [B, T, S, C] → [B, T, S, outputs]; t, t0 [B, C] are the embeddings of the timestep and of timestep zero."""

    def __init__(self, features: int, outputs: int, *, init=xavier, dtype, param_dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(features, affine=False)
        self.linear = Linear(
            features, outputs, ("embed", None), init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (2, features), param_dtype) / features**0.5)

    def __call__(self, x, t, x_mask=None, t0=None):
        y = self._modulated(x, t)
        if x_mask is not None:
            # The reference normalises the already modulated stream again for condition frames. Their outputs are
            # discarded by sampling and loss, but released weights were recorded so; kept for parity.
            y = jnp.where(x_mask[:, :, None, None], y, self._modulated(y, t0))
        return self.linear(y)

    def _modulated(self, x, t):
        shift, scale = table_rows(self.scale_shift_table[...], jnp.concatenate([t, t], -1)[:, None])
        return modulate(self.norm(x), shift, scale)


class AdaLNFinalLayer(nnx.Module):
    """DiT and Latte: shift and scale from a projection of their own; begins as zero."""

    def __init__(self, features: int, outputs: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        kwargs = dict(init=zeros, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = LayerNorm(features, affine=False)
        self.modulation = Linear(features, 2 * features, ("embed", None), **kwargs)
        self.linear = Linear(features, outputs, ("embed", None), **kwargs)

    def __call__(self, x, condition):
        """x [B, T, S, C]; condition [B, C]."""
        shift, scale = rows(self.modulation(jax.nn.silu(condition))[:, None], 2)
        return self.linear(modulate(self.norm(x), shift, scale))
