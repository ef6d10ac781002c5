"""Sampling from an IDDPM process: ancestral steps (arXiv 2006.11239) as Open-Sora 1.0-1.3 take them, and DDIM (2010.02502).

    solver = Ancestral(iddpm.Config(respacing="100"))
    state = solver.init(noise, key=key, mask=mask)
    for i in range(solver.steps):
        state = solver.step(predict, state, i, times)      # times = solver.schedule(noise.shape)

`predict(x, t, **extra)` returns the whole output of the (guided) network, learned variance included; with a mask it also
receives `x_mask` [B, T]. `mask` [B, T] in [0, 1] (1.1 on): a frame joins at step int(mask · steps), before that it is kept.
Quirk kept: frames with mask 0 join at the last step, so they leave as the network's view of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import iddpm
from opensora_jax.diffusion.masking import over_frames
from opensora_jax.sampling.noise import draw


class State(NamedTuple):
    latents: jax.Array
    key: jax.Array | None
    mask: jax.Array | None = None


@dataclass(frozen=True)
class Ancestral:
    process: iddpm.Config = field(default_factory=iddpm.Config)
    clip: bool = False

    @property
    def steps(self) -> int:
        return iddpm.tables(self.process).steps

    def schedule(self, shape: tuple[int, ...], sizes: dict[str, Any] | None = None) -> np.ndarray:
        """The times [steps] that the network sees, from noise to data."""
        return iddpm.tables(self.process).timestep_map[::-1].copy()

    def init(self, latents, *, key=None, mask=None) -> State:
        return State(latents, key, mask)

    def step(self, predict: Callable, state: State, i, times, *, noise=None) -> State:
        """One step; `noise` replaces the draws: with a mask the pair (for joining frames, of the step)."""
        x, key = state.latents, state.key
        t = jnp.full(x.shape[0], self.steps - 1 - i)
        key, draws = draw(key, noise, x, count=1 if state.mask is None else 2)
        before, extra = x, {}
        if state.mask is not None:
            level = (state.mask * self.steps).astype(jnp.int32)
            here = over_frames(level == t[:, None], x)
            x = jnp.where(here, iddpm.q_sample(x, t, draws[0], self.process).astype(x.dtype), x)
            extra["x_mask"] = level > t[:, None]
        output = predict(x, jnp.broadcast_to(jnp.asarray(times)[i], x.shape[:1]), **extra)
        out = self._move(output.astype(jnp.float32), x, t, draws[-1]).astype(x.dtype)
        if state.mask is not None:
            out = jnp.where(over_frames(level < t[:, None], x), before, out)
        return State(out, key, state.mask)

    def _move(self, output, x, t, noise):
        p = iddpm.p_mean_variance(output, x, t, self.process, clip=self.clip)
        last = (t == 0).reshape((-1,) + (1,) * (x.ndim - 1))
        return p["mean"] + jnp.where(last, 0, jnp.exp(0.5 * p["log_variance"]) * noise)


@dataclass(frozen=True)
class DDIM(Ancestral):
    """eta 0: deterministic; 1: as random as ancestral steps. `reverse`: from data to noise, for inversion."""

    eta: float = 0.0
    reverse: bool = False

    def schedule(self, shape: tuple[int, ...], sizes: dict[str, Any] | None = None) -> np.ndarray:
        times = super().schedule(shape, sizes)
        return times[::-1].copy() if self.reverse else times

    def step(self, predict: Callable, state: State, i, times, *, noise=None) -> State:
        if self.reverse:
            x, t = state.latents, jnp.full(state.latents.shape[0], i)
            output = predict(x, jnp.broadcast_to(jnp.asarray(times)[i], x.shape[:1])).astype(jnp.float32)
            x0 = iddpm.p_mean_variance(output, x, t, self.process, clip=self.clip)["x0"]
            following = iddpm.at(iddpm.tables(self.process).alphas_cumprod_next, t, x)
            eps = iddpm.noise_from_x0(x, t, x0, self.process)
            return state._replace(latents=(jnp.sqrt(following) * x0 + jnp.sqrt(1 - following) * eps).astype(x.dtype))
        if noise is None and self.eta == 0 and state.mask is None:
            noise = jnp.zeros_like(state.latents)
        return super().step(predict, state, i, times, noise=noise)

    def _move(self, output, x, t, noise):
        tab = iddpm.tables(self.process)
        x0 = iddpm.p_mean_variance(output, x, t, self.process, clip=self.clip)["x0"]
        eps = iddpm.noise_from_x0(x, t, x0, self.process)
        bar, before = iddpm.at(tab.alphas_cumprod, t, x), iddpm.at(tab.alphas_cumprod_prev, t, x)
        sigma = self.eta * jnp.sqrt((1 - before) / (1 - bar)) * jnp.sqrt(1 - bar / before)
        last = (t == 0).reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.sqrt(before) * x0 + jnp.sqrt(1 - before - sigma**2) * eps + jnp.where(last, 0, sigma * noise)
