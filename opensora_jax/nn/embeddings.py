"""Patches, timesteps, sizes, labels and captions as vectors of the model's width."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.nn.linear import Conv, Embed, Linear, normal, xavier
from opensora_jax.nn.mlp import MLP
from opensora_jax.nn.params import Buffer, partition


def timestep_sinusoid(t, dim: int = 256, max_period: float = 10000.0, shift: int = 0):
    """[..., dim] float32: cosines first, then sines (the reverse of the position tables). With a shift of 1 the last
    frequency is 1 / max_period itself."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    table = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return table if dim % 2 == 0 else jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, 1)])


class TimestepEmbedder(nnx.Module):
    """A scalar in [0, 1000] → width, through a sinusoid and a two-layer SiLU network (mlp.0 and mlp.2)."""

    def __init__(
        self, features, *, frequency_dim=256, frequency_shift=0, init=None, init_out=None, dtype, param_dtype, rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.frequency_dim, self.frequency_shift, self.dtype = frequency_dim, frequency_shift, jnp.dtype(dtype)
        self.fc1 = Linear(frequency_dim, features, (None, "embed"), init=init or normal(0.02), **kwargs)
        self.fc2 = Linear(features, features, ("embed", None), init=init_out or init or normal(0.02), **kwargs)

    def __call__(self, t):
        waves = timestep_sinusoid(t, self.frequency_dim, shift=self.frequency_shift)
        return self.fc2(jax.nn.silu(self.fc1(waves.astype(self.dtype))))


class SizeEmbedder(TimestepEmbedder):
    """Sizes [B] or [B, d]: each scalar embedded, results concatenated to [B, d * features]."""

    def __call__(self, sizes):
        sizes = sizes if sizes.ndim == 2 else sizes[:, None]
        return super().__call__(sizes).reshape(sizes.shape[0], -1)


class LabelEmbedder(nnx.Module):
    """Class ids; the last row (only when classes can be dropped) is "no class"."""

    def __init__(self, classes, features, *, drop_prob, dtype, param_dtype, rngs):
        self.null_id, self.droppable = classes, drop_prob > 0
        self.table = Embed(classes + (drop_prob > 0), features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, labels, drop=None):
        if drop is not None and not self.droppable:
            raise ValueError("labels cannot be dropped: the network was built without a null class")
        return self.table(labels if drop is None else jnp.where(drop, self.null_id, labels))


class CaptionEmbedder(nnx.Module):
    """Text features [B, L, D] → width. `null` is the learned stand-in for no caption; it is loaded, never trained."""

    def __init__(self, text_dim, features, tokens, *, init=None, dtype, param_dtype, rngs):
        self.y_proj = MLP(
            text_dim, features, features, init=init or normal(0.02), dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        draw = partition(normal(1 / math.sqrt(text_dim)), None, "embed")
        self.null = Buffer(draw(rngs.params(), (tokens, text_dim), param_dtype)) if tokens else None

    def __call__(self, y, drop=None):
        """drop [B] bool replaces whole captions before projection; the mask stays that of the caption (as trained)."""
        if drop is not None:
            if self.null is None:
                raise ValueError("captions cannot be dropped: the network was built without a null caption")
            null = self.null[...].astype(y.dtype)
            null = null[jnp.arange(y.shape[-2]) % null.shape[0]]  # Open-Sora-Plan's has 120 rows for 300 tokens
            y = jnp.where(drop.reshape(-1, *[1] * (y.ndim - 1)), null, y)
        return self.y_proj(y)


class PatchEmbed3D(nnx.Module):
    """[B, T, H, W, C] → [B, T', H', W', features]; zero padding at the end of each axis up to the patch size. A patch
    of two numbers is that of an image network, whose kernel knows no time."""

    def __init__(self, patch, channels, features, *, bias=True, init=None, dtype, param_dtype, rngs):
        self.patch = tuple(patch)
        self.proj = Conv(
            channels, features, patch, strides=patch, bias=bias, axes=(None, "embed"),
            init=init or flattened_xavier, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x):
        """As one product: a convolution would copy the tokens twice on a TPU."""
        kernel, bias = self.proj.kernel[...], self.proj.bias
        x = patchify(pad_to_patch(x, self.patch), self.patch).astype(self.proj.dtype)
        y = x @ kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)
        return y if bias is None else y + bias[...].astype(y.dtype)


def flattened_xavier(key, shape, dtype=jnp.float32, out_sharding=None):
    """Xavier-uniform of the patch convolution seen as one matrix."""
    return xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def patch_3d(patch):
    return (1,) * (3 - len(patch)) + tuple(patch)


def pad_to_patch(x, patch):
    pads = [(0, -size % p) for size, p in zip(x.shape[1:4], patch_3d(patch))]
    return jnp.pad(x, [(0, 0), *pads, (0, 0)]) if any(p for _, p in pads) else x


def patchify(x, patch):
    """[B, T, H, W, C] → [B, T', H', W', pt*ph*pw*C], the reverse of `unpatchify`."""
    b, t, h, w, channels = x.shape
    pt, ph, pw = patch_3d(patch)
    x = x.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t // pt, h // ph, w // pw, -1)


def unpatchify(x, patch, channels: int):
    """[B, T', H', W', pt*ph*pw*c] → [B, T, H, W, c]; channels run fastest within a token."""
    b, t, h, w, _ = x.shape
    pt, ph, pw = patch_3d(patch)
    x = x.reshape(b, t, h, w, pt, ph, pw, channels)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * pt, h * ph, w * pw, channels)
