"""How tokens lie in memory between two exchanges: in one piece for each device that shares them, one after the other.

A stream [B, T, S, C] that changes between frames cut and positions cut is kept as [n * B, ...]: the pieces of all samples
that come from, or go to, the first of n devices, then those of the second. That is the order in which an all-to-all
reads and writes; in any other, both of its sides copy the stream.
"""

import jax.numpy as jnp


def cut(x, pieces: int, axis: int):
    """[B, ...] → [n * B, ...], `axis` in n pieces."""
    if pieces == 1:
        return x
    batch, length = x.shape[0], x.shape[axis]
    x = x.reshape(*x.shape[:axis], pieces, length // pieces, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis, 0)
    return x.reshape(pieces * batch, *x.shape[2:])


def join(x, pieces: int, axis: int):
    """The reverse of `cut`."""
    if pieces == 1:
        return x
    x = jnp.moveaxis(x.reshape(pieces, -1, *x.shape[1:]), 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
