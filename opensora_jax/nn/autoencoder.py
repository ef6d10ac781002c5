"""The two blocks that every convolutional autoencoder of this family is made of, over [B, *space, C]."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.kernels.attention import attention
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.parallel.shard import constrain


class ResnetBlock(nnx.Module):
    """norm, activation, convolution, twice; the input is added, through a 1-wide convolution when channels change.

    conv(inputs, outputs, kernel_size) makes a convolution of the family's kind that keeps the size."""

    def __init__(self, inputs, outputs, conv: Callable, *, groups=32, eps=1e-6, act=jax.nn.silu, param_dtype="float32"):
        self.act = act
        self.norm1 = GroupNorm(inputs, groups=groups, eps=eps, param_dtype=param_dtype)
        self.conv1 = conv(inputs, outputs, 3)
        self.norm2 = GroupNorm(outputs, groups=groups, eps=eps, param_dtype=param_dtype)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = conv(inputs, outputs, 1) if inputs != outputs else None

    def __call__(self, x):
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        return (x if self.shortcut is None else self.shortcut(x)) + h


def shared_attention(q, k, v, **masks):
    """Under `context` each device attends for its share of the queries."""
    return attention(constrain(q, "batch", "tokens"), k, v, **masks)


def in_rows(x):
    """Some rows (or else columns) of the picture on a device, as pixels and latents come in: said again around attention,
    because a share of the tokens of several frames is none of the rows."""
    return constrain(x, "batch", *[None] * (x.ndim - 4), "space", "space")


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all positions, in row-major order. The published 1-wide convolutions are
    the linear maps that they are."""

    def __init__(self, features, *, groups=32, eps=1e-6, dtype, param_dtype, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = GroupNorm(features, groups=groups, eps=eps, param_dtype=param_dtype)
        self.q, self.k, self.v, self.proj = (Linear(features, features, **kwargs) for _ in range(4))

    def __call__(self, x, attend: Callable = shared_attention):
        """attend: attention over q, k, v [B, N, 1, C] with the masking of the family."""
        batch, *space, features = x.shape
        x = in_rows(x)
        h = self.norm(x).reshape(batch, math.prod(space), features)
        q, k, v = (project(h)[:, :, None] for project in (self.q, self.k, self.v))
        return in_rows(x + self.proj(attend(q, k, v)[:, :, 0]).reshape(x.shape))


def frame_causal_attention(q, k, v, *, frames: int):
    """[B, frames * N, heads, d]: a position sees its own frame and those before it. Frame by frame, so that neither a
    mask nor the scores of the whole clip are ever held."""
    batch, tokens, heads, dim = q.shape
    per_frame = tokens // frames
    if frames == 1:
        return shared_attention(q, k, v)

    def one(frame):
        index, q = frame
        return shared_attention(q, k, v, kv_lengths=jnp.full((batch,), (index + 1) * per_frame))

    by_frame = jnp.moveaxis(q.reshape(batch, frames, per_frame, heads, dim), 1, 0)
    out = jax.lax.map(one, (jnp.arange(frames), by_frame))
    return jnp.moveaxis(out, 0, 1).reshape(batch, tokens, heads, -1)
