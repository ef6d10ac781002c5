"""Normalisations, all computed in float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """Over the last axis; `affine=False` in adaLN blocks, where scale and shift come from the timestep."""

    def __init__(
        self, features: int, *, eps: float = 1e-6, affine: bool = True, bias: bool = True, param_dtype="float32"
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if affine and bias else None

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return _affine(y, self.scale, self.bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Over the last axis, a learned weight, no mean (q/k norm, T5)."""

    def __init__(self, features: int, *, eps: float = 1e-6, param_dtype="float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return _affine(y, self.scale, None).astype(x.dtype)


class GroupNorm(nnx.Module):
    """[B, *space, C]: statistics over space and the channels of a group (two passes, as stable as PyTorch's)."""

    def __init__(self, features: int, *, groups: int = 32, eps: float = 1e-6, param_dtype="float32"):
        if features % groups:
            raise ValueError(f"GroupNorm: {features} channels do not split into {groups} groups")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x):
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        over = (*range(1, x.ndim - 1), x.ndim)
        mean = grouped.mean(over, keepdims=True)
        variance = jnp.square(grouped - mean).mean(over, keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return _affine(y, self.scale, self.bias).astype(x.dtype)


def _affine(y, scale, bias):
    if scale is not None:
        y = y * scale[...].astype(jnp.float32)
    return y if bias is None else y + bias[...].astype(jnp.float32)
