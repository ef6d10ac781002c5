"""Classifier-free guidance: one call of the network on a stacked batch, its branches mixed into one prediction.

`conditions` are dicts of the network's keyword arguments, all with the same keys, in the order full, without text.
The remaining channels of a prediction (learned sigma) come from the full branch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


def stack(conditions: tuple[dict, ...]) -> dict:
    """The branches one after the other along the batch; what is no array (a flag, None) is taken from the first."""

    def join(*values):
        if isinstance(values[0], (jax.Array, np.ndarray)):
            return jnp.concatenate(values)
        return values[0]

    return {name: join(*(c[name] for c in conditions)) for name in conditions[0]}


@dataclass(frozen=True)
class ClassifierFree:
    """v = u + scale · (c - u) on the first `channels` channels (None: as many as the latents have)."""

    scale: float = 7.0
    channels: int | None = None

    def __call__(self, model_fn, conditions: tuple[dict, ...], x, t, **extra):
        """extra: further arguments of the network that no branch changes, such as x_mask."""
        full, null = ({**c, **extra} for c in conditions)
        out = model_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), **stack((full, null)))
        cond, uncond = jnp.split(out, 2)
        k = x.shape[-1] if self.channels is None else self.channels
        guided = uncond[..., :k] + self.scale * (cond[..., :k] - uncond[..., :k])
        return jnp.concatenate([guided, cond[..., k:]], axis=-1)
