"""Classifier-free guidance: one call of the network on a stacked batch, its branches mixed into one prediction.

`conditions` holds the network's keyword arguments of each branch, all dicts with the same keys, in the order
full, without text, [without text and image]. Two branches: v = u + g (c - u). Three (Open-Sora 1.3 and 2.0):
v = n + g_image (u - n) + g (c - u). One: no guidance (distilled networks). Channels of the prediction beyond the guided
ones (learned sigma) come from the full branch.

The references oscillate: after `full_steps` steps every odd step has scale 1, where the mix *is* the full branch. With
`exact` those steps call the network on one branch only, the same result up to rounding: 80 forwards for 2.0's 50 steps
of text to video (two branches: nothing hangs on an image that is not there), where the reference makes 150.
`branches(i, n)` says how many step i needs; it must be static under jit, so compile one step for each of its values.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError


def stack(conditions: tuple[dict, ...]) -> dict:
    """The branches one after the other along the batch; what is no array (a flag, None) is taken from the first."""

    def join(*values):
        return jnp.concatenate(values) if isinstance(values[0], (jax.Array, np.ndarray)) else values[0]

    return {name: join(*(c[name] for c in conditions)) for name in conditions[0]}


@dataclass(frozen=True)
class Guidance:
    scale: float = 7.0
    image_scale: float = 1.0
    channels: int | None = None  # how many are guided; None: as many as the latents have. 1.0 guides 3 of 4
    oscillate_text: bool = False
    oscillate_image: bool = False
    full_steps: int = 10
    image_floor: float | None = (
        None  # the image scale grows from here over the frames, and sinks to here over the steps
    )
    ramp_steps: int = 0  # steps in which it sinks: the solver's (1.3), one more than the solver's (2.0)
    rescale: float = 0.0  # part of the mix brought to the full branch's standard deviation (1.3 use_flaw_fix: 0.7)
    exact: bool = True

    def __post_init__(self):
        if self.image_floor is not None and self.ramp_steps < 2:
            raise UserError("Guidance.image_floor needs ramp_steps, the number of sampling steps")

    def _oscillate(self, scale: float, i, on: bool):
        if not on:
            return scale
        if isinstance(i, int):
            return scale if i < self.full_steps or i % 2 == 0 else 1.0
        return jnp.where((i < self.full_steps) | (i % 2 == 0), scale, 1.0)

    def scales(self, i, frames: int):
        """Text scale, and image scale (a number, or one for each latent frame [T]) of step i; i may be traced."""
        text = self._oscillate(self.scale, i, self.oscillate_text)
        image = self._oscillate(self.image_scale, i, self.oscillate_image)
        if self.image_floor is None or self.image_scale <= self.image_floor:
            return text, image
        xp = np if isinstance(i, int) else jnp
        ramp = np.linspace(self.image_scale, self.image_floor, self.ramp_steps, dtype=np.float32)
        top = xp.asarray(ramp)[i]
        over_frames = self.image_floor + (top - self.image_floor) * np.linspace(0, 1, frames, dtype=np.float32)
        return text, xp.where(image > self.image_floor, over_frames, image)

    def branches(self, i: int, conditions: int) -> int:
        """How many of the conditions step i has to call the network with."""
        if not self.exact or conditions == 1:
            return conditions
        text, image = self.scales(i, 2)
        if conditions == 3 and np.any(image != 1):
            return 3
        return 1 if text == 1 else 2

    def __call__(self, model_fn, conditions, x, t, i=0, *, branches: int | None = None, scales=None, **extra):
        """The guided prediction at step i; `extra`: arguments of the network that no branch changes, such as x_mask.
        `scales`: of this step, when they were worked out on the host."""
        n = len(conditions) if branches is None else branches
        tile = lambda value: jnp.concatenate([value] * n) if n > 1 else value
        conditions = tuple({**c, **extra} for c in conditions[:n])
        out = model_fn(tile(x), tile(t), **stack(conditions))
        if n == 1:
            return out
        full, *others = jnp.split(out, n)
        k = x.shape[-1] if self.channels is None else self.channels
        cond, without_text = full[..., :k], others[0][..., :k]
        text, image = self.scales(i, x.shape[1]) if scales is None else scales
        mixed = without_text + text * (cond - without_text)
        if n == 3:
            nothing = others[1][..., :k]
            image = jnp.asarray(image).reshape(-1, 1, 1, 1)
            mixed = nothing + image * (without_text - nothing) + text * (cond - without_text)
        if self.rescale:
            mixed = mixed * (self.rescale * _std(cond) / _std(mixed) + 1 - self.rescale)
        return jnp.concatenate([mixed.astype(full.dtype), full[..., k:]], axis=-1)


def _std(x):
    return jnp.std(x, axis=tuple(range(1, x.ndim)), ddof=1, keepdims=True)


def open_sora_v2(steps: int = 50, scale: float = 7.5, image_scale: float = 3.0, *, image: bool, **options) -> Guidance:
    """The released settings of 2.0; `image`: the task is i2v, whose image scale also varies over frames and steps."""
    ramp = {"image_floor": 1.0, "ramp_steps": steps + 1} if image else {}
    return Guidance(scale, image_scale, oscillate_text=True, oscillate_image=True, **ramp | options)
