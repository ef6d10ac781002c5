"""Sine-cosine tables and rotary embeddings in the Open-Sora conventions."""

import jax.numpy as jnp
import numpy as np


def sincos_1d(positions, dim: int):
    """[..., dim]: sines in the first half, cosines in the second (MAE order). Positions known while tracing (numpy)
    give a constant computed in float64, as the references do."""
    omega = 1.0 / 10000.0 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    if isinstance(positions, np.ndarray):
        angles = positions[..., None] * omega
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)
    angles = jnp.asarray(positions)[..., None] * jnp.asarray(omega, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def sincos_2d(height_positions, width_positions, dim: int):
    """[H, W, dim]: the first half of the channels encodes the width coordinate, the second the height coordinate."""
    shape = (height_positions.shape[0], width_positions.shape[0], dim // 2)
    w, h = sincos_1d(width_positions, dim // 2), sincos_1d(height_positions, dim // 2)
    return jnp.concatenate([jnp.broadcast_to(w, shape), jnp.broadcast_to(h[:, None], shape)], -1)


def grid_sincos(grid: tuple[int, int], dim: int, *, scale=1.0, base: int | None = None):
    """[H, W, dim] for a grid of patches: positions 0..n-1 divided by `scale`, stretched to `base` positions a side."""
    xp = np if isinstance(scale, (int, float)) else jnp
    h, w = (xp.arange(n) / scale * (base / n if base else 1.0) for n in grid)
    return sincos_2d(h, w, dim)


def resolution_scale(height, width, input_sq_size: float):
    """Side of the square with as many pixels, in units of `input_sq_size`. That of the first sample: a batch is one
    bucket, so it is everybody's."""
    return jnp.sqrt(height[0].astype(jnp.float32) * width[0].astype(jnp.float32)) / input_sq_size


def rope_frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """theta^(-2i/dim), i = 0..dim/2-1."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def rope_table(positions, frequencies):
    """Cosine and sine [..., dim] for interleaved pairs: both entries of a pair share an angle."""
    angles = jnp.repeat(jnp.asarray(positions, jnp.float32)[..., None] * frequencies, 2, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rope_3d(sizes: tuple[int, int, int], frequencies, scale=1.0):
    """Cosine and sine [T*H*W, 3*dim]: a third of the head each for frame, height and width; `scale` divides the
    positions in space."""
    frame, height, width = (jnp.arange(n, dtype=jnp.float32) for n in sizes)
    axes = jnp.meshgrid(frame, height / scale, width / scale, indexing="ij")
    tables = [rope_table(axis.reshape(-1), frequencies) for axis in axes]
    return tuple(jnp.concatenate(parts, -1) for parts in zip(*tables))


def apply_rope_interleaved(x, cos, sin):
    """Rotates pairs (x0, x1), (x2, x3), ... of the last axis; cos and sin broadcast against x."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
    return (x * cos + rotated * sin).astype(x.dtype)


def rope_angles(ids, dims: tuple[int, ...], theta: float = 10000.0):
    """Several axes side by side: ids [..., len(dims)] → angles [..., sum(dims) / 2], one for each rotated pair."""
    ids = jnp.asarray(ids, jnp.float32)
    return jnp.concatenate([ids[..., i, None] * rope_frequencies(dim, theta) for i, dim in enumerate(dims)], -1)


def apply_rope_halves(x, cos, sin):
    """Rotates the pairs (x_k, x_{k + d/2}) of the last axis (Llama's layout); cos and sin broadcast against x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return (x * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)
