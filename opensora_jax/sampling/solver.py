"""What all solvers have in common, how to name one, and two loops over it.

    solver = make(objective, steps=30)                               # Euler for a rectified flow, DDPM for IDDPM, …
    latents = sample(solver, Guidance(7.0), denoise, params, conditions, noise, key=key, on_step=print)

`denoise(params, x, t, **condition)` is the network; `conditions` the branches of guidance.py. The loop compiles one step
(one for each number of branches the guidance needs) and calls it from the host, so progress shows and any number of steps
fits; `scan` runs all steps inside one program.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import iddpm, rectified_flow
from opensora_jax.sampling import diffusers, dpm_solver
from opensora_jax.sampling.ddim import DDIM, Ancestral
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance

NAMES = ("euler", "ddpm", "ddim", "dpm_solver", *diffusers.NAMES)


class Solver(Protocol):
    @property
    def steps(self) -> int:
        """Calls of `step`."""
        ...

    def schedule(self, shape: tuple[int, ...], sizes: dict[str, Any] | None = None) -> np.ndarray:
        """The times visited, made on the host; sizes: height, width, num_frames [B] in pixels."""
        ...

    def init(self, latents, *, key=None) -> Any:
        """The state before the first step, a pytree with `latents` [B, T, H, W, C]."""
        ...

    def step(self, predict: Callable, state, i, times, *, noise=None) -> Any:
        """The state after step i, which may be traced; predict(x, t, **extra) is the guided network."""
        ...


def make(objective: rectified_flow.Config | iddpm.Config, steps: int, name: str = "", **options) -> Solver:
    """A solver for what a network was trained with; no name: Euler for a rectified flow, DDPM for IDDPM.

    options: of the solver, e.g. eta for ddim, order for dpm_solver, shift for euler.
    """
    flow = isinstance(objective, rectified_flow.Config)
    name = name or ("euler" if flow else "ddpm")
    if name not in NAMES:
        raise UserError(f"unknown solver {name!r}; choose one of {', '.join(NAMES)}")
    if flow != (name == "euler"):
        kind = "a rectified flow" if flow else "IDDPM"
        fitting = "euler" if flow else ", ".join(NAMES[1:])
        raise UserError(f"solver {name!r} does not fit a network trained as {kind}; choose {fitting}")
    try:
        if isinstance(objective, rectified_flow.Config):
            given = {"shift": objective.time.shift, "discrete": objective.time.method == "discrete"} | options
            return Euler(steps, objective.num_timesteps, toward_data=objective.toward_data, **given)
        if name in ("ddpm", "ddim"):
            process = replace(objective, respacing=str(steps))
            return Ancestral(process, **options) if name == "ddpm" else DDIM(process, **options)
        if name == "dpm_solver":
            return dpm_solver.open_sora(steps, **options)
        return diffusers.scheduler(name, steps, **options)
    except TypeError as error:
        raise UserError(f"solver {name}: {error}") from None


@partial(jax.jit, static_argnames=("solver", "guidance", "denoise", "branches"), donate_argnames="state")
def _step(params, state, conditions, times, i, *, solver, guidance, denoise, branches):
    model_fn = partial(denoise, params)
    predict = lambda x, t, **extra: guidance(model_fn, conditions, x, t, i, branches=branches, **extra)
    return solver.step(predict, state, i, times)


def sample(
    solver: Solver,
    guidance: Guidance,
    denoise: Callable,
    params,
    conditions: tuple[dict, ...],
    latents,
    *,
    sizes: dict | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **start,
):
    """Latents at the end of the solver's steps; `latents`: the noise; `start`: key, mask, reference for solver.init.

    on_step(done, steps) is called when a step is done. solver, guidance and denoise must be hashable.
    """
    times = solver.schedule(latents.shape, sizes)
    state = jax.tree.map(jnp.copy, solver.init(jnp.asarray(latents), **start))  # steps donate it
    for i in range(solver.steps):
        branches = guidance.branches(i, len(conditions))
        settings = {"solver": solver, "guidance": guidance, "denoise": denoise, "branches": branches}
        state = _step(params, state, conditions, times, np.int32(i), **settings)
        if on_step is not None:
            jax.block_until_ready(state.latents)
            on_step(i + 1, solver.steps)
    return state.latents


def scan(solver: Solver, predict: Callable, state, times):
    """All steps in one loop on the device, for use under jit; predict(x, t, i, **extra)."""

    def body(state, i):
        return solver.step(lambda x, t, **extra: predict(x, t, i, **extra), state, i, times), None

    return jax.lax.scan(body, state, jnp.arange(solver.steps))[0]
