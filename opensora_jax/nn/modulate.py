"""adaLN: shift, scale and gate from the timestep, per sample or per frame.

Condition frames (x_mask False) take the modulation of timestep 0, so modulation tensors are [B, 1 or T, ..., C].
"""

import jax.numpy as jnp


def modulate(x_normed, shift, scale):
    """x (1 + scale) + shift in float32; x [B, T, S, C], shift and scale [B, 1 or T, 1, C]."""
    y = x_normed.astype(jnp.float32) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return y.astype(x_normed.dtype)


def by_frame(generated, condition, x_mask):
    """Picks per frame between two [B, C] vectors: x_mask [B, T], True = generated. Returns [B, 1 or T, C]."""
    if x_mask is None:
        return generated[:, None]
    return jnp.where(x_mask[:, :, None], generated[:, None], condition[:, None])


def table_rows(table, vectors):
    """scale_shift_table [n, C] + timestep vectors [B, T', n * C] → n arrays [B, T', 1, C], float32."""
    rows = table.shape[0]
    shifted = table.astype(jnp.float32) + vectors.astype(jnp.float32).reshape(*vectors.shape[:2], rows, -1)
    return [shifted[:, :, i, None] for i in range(rows)]
