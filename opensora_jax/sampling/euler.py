"""Euler steps along a rectified flow (Open-Sora 1.2, 1.3 and 2.0), with frames that are kept, edited or generated.

    solver = Euler(steps=30, shift=PixelShift("chunks"))
    times = solver.schedule(latents.shape, sizes)             # on the host
    state = solver.init(noise, mask=mask, key=key)
    for i in range(solver.steps):
        state = solver.step(predict, state, i, times)         # pure: jit it, donate the state
    state.latents

`predict(x, t, **extra)` is the guided network; with a mask it also receives `x_mask` [B, T].
`mask` [B, T] in [0, 1]: 1 a frame to generate, 0 one to keep exactly, between: noised to that level and redrawn from
there (SDEdit). `reference` (latents, [B, T] mask): at every step these frames are set to the reference, noised to the
step's level (1.3 use_sdedit). Quirk kept: a shift that rounds the first time to 1000.0001 leaves frames with mask == 1
out of step 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion.masking import over_frames
from opensora_jax.diffusion.rectified_flow import add_noise
from opensora_jax.diffusion.timesteps import PixelShift, TokenShift, euler_schedule
from opensora_jax.sampling.noise import draw


class State(NamedTuple):
    latents: jax.Array  # [B, T, H, W, C]
    key: jax.Array | None
    mask: jax.Array | None  # [B, T] float
    noised: jax.Array | None  # [B, T] bool: frames that have joined the flow
    reference: tuple[jax.Array, jax.Array] | None = None


@dataclass(frozen=True)
class Euler:
    steps: int = 30
    num_timesteps: int = 1000
    shift: PixelShift | TokenShift | None = None
    discrete: bool = False
    toward_data: bool = True

    def schedule(self, shape: tuple[int, ...], sizes: dict[str, Any] | None = None) -> np.ndarray:
        """Times [steps + 1, B]; sizes: height, width, num_frames [B] in pixels, for a PixelShift."""
        return euler_schedule(
            self.steps,
            self.num_timesteps,
            shape[0],
            shift=self.shift,
            sizes=sizes,
            shape=shape,
            discrete=self.discrete,
        )

    def init(self, latents, *, key=None, mask=None, reference=None) -> State:
        """latents: noise, with the reference frames in place where mask < 1; key: for frames that join later."""
        return State(latents, key, mask, None if mask is None else mask == 1, reference)

    def step(self, predict: Callable, state: State, i, times, *, noise=None) -> State:
        """One step; `noise` replaces the draw with which masked frames join."""
        t, t_next = jnp.asarray(times)[i], jnp.asarray(times)[i + 1]
        x, key, extra = state.latents, state.key, {}
        before, active = x, None
        if state.mask is not None or state.reference is not None:
            key, (noise,) = draw(key, noise, x)
        if state.mask is not None and state.noised is not None:
            active = state.mask * self.num_timesteps >= t[:, None]
            joining = active & ~state.noised
            x = jnp.where(over_frames(joining, x), add_noise(x, noise, t, self.num_timesteps).astype(x.dtype), x)
            extra["x_mask"] = active
        if state.reference is not None:
            held = add_noise(state.reference[0], noise, t, self.num_timesteps).astype(x.dtype)
            x = jnp.where(over_frames(state.reference[1], x) == 1, held, x)
        velocity = predict(x, t, **extra)[..., : x.shape[-1]]
        dt = (t - t_next) / self.num_timesteps * (1 if self.toward_data else -1)
        x = (x + velocity * dt.reshape((-1,) + (1,) * (x.ndim - 1))).astype(x.dtype)
        if active is not None:
            x = jnp.where(over_frames(active, x), x, before)
        return State(x, key, state.mask, active, state.reference)
