"""Sine-cosine tables and rotary embeddings in the Open-Sora conventions."""

import jax.numpy as jnp
import numpy as np


def sincos_1d(positions, dim: int):
    """[..., dim]: sines in the first half, cosines in the second (MAE order)."""
    omega = 1.0 / 10000.0 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = jnp.asarray(positions)[..., None] * jnp.asarray(omega, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def sincos_2d(height_positions, width_positions, dim: int):
    """[H, W, dim]: the first half of the channels encodes the width coordinate, the second the height coordinate."""
    h, w = jnp.meshgrid(height_positions, width_positions, indexing="ij")
    return jnp.concatenate([sincos_1d(w, dim // 2), sincos_1d(h, dim // 2)], -1)


def rope_frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """theta^(-2i/dim), i = 0..dim/2-1."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)


def rope_table(positions, frequencies):
    """Cosine and sine [..., dim] for interleaved pairs: both entries of a pair share an angle."""
    angles = jnp.repeat(jnp.asarray(positions, jnp.float32)[..., None] * frequencies, 2, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope_interleaved(x, cos, sin):
    """Rotates pairs (x0, x1), (x2, x3), ... of the last axis; cos and sin broadcast against x."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
    return (x * cos + rotated * sin).astype(x.dtype)
