"""Frames that are given rather than generated: how losses average over the others.

`x_mask` [B, T] is True for a frame to generate, False for a condition frame, as everywhere in the house.
"""

import jax.numpy as jnp


def over_frames(mask, like):
    """[B, T] broadcast against [B, T, H, W, C]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def mean_per_sample(x, x_mask=None):
    """Mean over everything but the batch [B]; with x_mask over the frames to generate only."""
    axes = tuple(range(1, x.ndim))
    if x_mask is None:
        return x.mean(axes)
    per_frame = x[0, 0].size
    count = jnp.maximum(x_mask.sum(1), 1) * per_frame
    return (x * over_frames(x_mask, x)).sum(axes) / count
