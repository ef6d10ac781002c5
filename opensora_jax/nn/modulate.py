"""adaLN: shift, scale and gate from the timestep, per sample or per frame.

Condition frames (x_mask False) take the modulation of timestep 0, so modulation tensors are [B, 1 or T, ..., C].
"""

import jax
import jax.numpy as jnp

from opensora_jax.kernels import modulated

modulate = modulated.modulate


def by_frame(generated, condition, x_mask):
    """Picks per frame between two [B, C] vectors: x_mask [B, T], True = generated. Returns [B, 1 or T, C]."""
    if x_mask is None:
        return generated[:, None]
    return jnp.where(x_mask[:, :, None], generated[:, None], condition[:, None])


def table_rows(table, vectors):
    """scale_shift_table [n, C] + timestep vectors [B, T', n * C] → n arrays [B, T', 1, C], float32."""
    return rows(vectors, table.shape[0], table.astype(jnp.float32))


def rows(vectors, count: int, table=0.0):
    """[B, T', count * C] → `count` arrays [B, T', 1, C], float32, plus the rows of a table."""
    shifted = table + vectors.astype(jnp.float32).reshape(*vectors.shape[:2], count, -1)
    return [shifted[:, :, i, None] for i in range(count)]


def gated(h, gate, keep=None):
    """gate · h in float32; keep [B]: factors of drop path, or None."""
    h = (h.astype(jnp.float32) * gate).astype(h.dtype)
    return h if keep is None else h * keep[:, None, None, None].astype(h.dtype)


def kept(gate, keep):
    """A gate [B, T, 1, C] that drops paths: keep [B], or None."""
    return gate if keep is None else gate * keep[:, None, None, None]


def modulated_mlp(x, mlp, shift, scale, gate, keep=None, *, eps: float = 1e-6):
    """x + gate · mlp(norm(x) modulated), for an MLP with GELU in its tanh form and a norm without weights."""
    gate = kept(gate, keep)
    first, second = ((layer.kernel[...], layer.bias[...]) for layer in (mlp.fc1, mlp.fc2))
    return modulated.mlp(x, shift, scale, gate, first, second, eps=eps)


def drop_path(key, rate: float, shape: tuple[int, ...]):
    """Factors [depth, *branches, B] (0 or 1 / kept share) with rates rising linearly to `rate`; None when unused."""
    if key is None or rate == 0:
        return None
    rates = jnp.linspace(0, rate, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return jax.random.bernoulli(key, 1 - rates, shape) / (1 - rates)
