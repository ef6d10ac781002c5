"""Normalisations, all computed in float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.kernels.modulated import layer_norm
from opensora_jax.nn.params import Buffer


class LayerNorm(nnx.Module):
    """Over the last axis; `affine=False` in adaLN blocks, where scale and shift come from the timestep."""

    def __init__(
        self, features: int, *, eps: float = 1e-6, affine: bool = True, bias: bool = True, param_dtype="float32"
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if affine and bias else None

    def __call__(self, x):
        return _affine(layer_norm(x, self.eps), self.scale, self.bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Over the last axis, a learned weight, no mean (q/k norm, T5); DC-AE adds a bias."""

    def __init__(self, features: int, *, eps: float = 1e-6, bias: bool = False, param_dtype="float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if bias else None

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return _affine(y, self.scale, self.bias).astype(x.dtype)


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


class BatchNorm(nnx.Module):
    """[B, *space, C] by running statistics; with `train`, by those of the batch, and the running ones of this module
    (a copy, local to the traced call) move on: collect them with `running_statistics` before it goes."""

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1, param_dtype="float32"):
        self.eps, self.momentum = eps, momentum
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = Buffer(jnp.zeros(features, param_dtype))
        self.var = Buffer(jnp.ones(features, param_dtype))

    def __call__(self, x, *, train: bool = False):
        x32 = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.var[...]
        if train:
            over = range(x.ndim - 1)
            mean = x32.mean(over)
            variance = jnp.square(x32 - mean).mean(over)
            count = x.size // x.shape[-1]
            unbiased = variance * (count / max(count - 1, 1))
            for running, now in ((self.mean, mean), (self.var, unbiased)):
                running[...] = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(now)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return _affine(y, self.scale, self.bias).astype(x.dtype)


def running_statistics(module: nnx.Module) -> dict:
    """All buffers of a module, nested like its parameters, to be merged into them after a training step."""
    return nnx.to_pure_dict(nnx.state(module, Buffer))


def _affine(y, scale, bias):
    if scale is not None:
        y = y * scale[...].astype(jnp.float32)
    return y if bias is None else y + bias[...].astype(jnp.float32)
