"""Fresh noise for solvers that add some on the way."""

import jax

from opensora_jax.common.errors import UserError


def draw(key, noise, like, count: int = 1):
    """The key to go on with, and `count` arrays in the shape of `like`: the noise given, else drawn from the key."""
    if noise is not None:
        return key, (noise,) if count == 1 else tuple(noise)
    if key is None:
        raise UserError("this sampler draws noise in its steps: give solver.init a key")
    key, *keys = jax.random.split(key, count + 1)
    return key, tuple(jax.random.normal(k, like.shape, like.dtype) for k in keys)
