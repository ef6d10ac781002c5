"""One solver for all methods whose steps are linear in what they have seen: the method is a table made on the host.

At call i of the network: out = predict(input_scale · x, t); m = m_x · x + m_out · out, clipped to [-1, 1] when `clip`
(m is what the method remembers: the noise, or the data); then

    x ← keep·x + anchored·anchor + now·m + raw·out + Σ past_k·slot_k + noise·ε

with `anchor` the x of the last call marked `anchors`, and m put into slot `write` (-1: nowhere). Multistep methods use
slots, methods with inner steps (Heun, PNDM's Runge-Kutta start, singlestep DPM-Solver) the anchor. Coefficients are
computed in float64; a step costs one network call and a few fused multiplications, whatever the method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.sampling.noise import draw


@dataclass(frozen=True, eq=False)
class Table:
    """Rows, one a network call; scalars and missing columns are filled in by `Table.of`."""

    t: np.ndarray
    input_scale: np.ndarray
    m_x: np.ndarray
    m_out: np.ndarray
    keep: np.ndarray
    anchored: np.ndarray
    now: np.ndarray
    raw: np.ndarray
    past: np.ndarray  # [calls, slots]
    noise: np.ndarray
    anchors: np.ndarray
    write: np.ndarray
    clip: bool = False
    init_scale: float = 1.0  # of the noise that sampling starts from

    @staticmethod
    def of(t, *, slots: int = 0, clip: bool = False, init_scale: float = 1.0, **columns) -> "Table":
        n = len(t)
        defaults = dict(input_scale=1.0, m_x=0.0, m_out=1.0, keep=0.0, anchored=0.0, now=0.0, raw=0.0, noise=0.0)
        filled = {k: np.broadcast_to(np.asarray(columns.pop(k, v), float), n) for k, v in defaults.items()}
        past = np.asarray(columns.pop("past", np.zeros((n, slots))), float).reshape(n, slots)
        anchors = np.broadcast_to(columns.pop("anchors", False), n)
        write = np.broadcast_to(columns.pop("write", -1), n)
        if columns:
            raise TypeError(f"no such columns: {', '.join(columns)}")
        t = np.asarray(t, np.float32)
        return Table(t, **filled, past=past, anchors=anchors, write=write, clip=clip, init_scale=init_scale)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        names = ("input_scale", "m_x", "m_out", "keep", "anchored", "now", "raw", "past", "noise")
        return {name: getattr(self, name).astype(np.float32) for name in names}


class State(NamedTuple):
    latents: jax.Array
    key: jax.Array | None
    anchor: jax.Array | None
    slots: jax.Array  # [slots, B, T, H, W, C]


@dataclass(frozen=True)
class Linear:
    """A solver over a table; `steps` counts network calls."""

    table: Table

    @property
    def steps(self) -> int:
        return len(self.table.t)

    def schedule(self, shape: tuple[int, ...], sizes: dict[str, Any] | None = None) -> np.ndarray:
        return self.table.t

    def init(self, latents, *, key=None) -> State:
        """latents: standard normal noise; key: for the methods that add noise on the way."""
        latents = latents * jnp.asarray(self.table.init_scale, latents.dtype)
        anchor = jnp.zeros_like(latents) if self.table.anchors.any() else None
        return State(latents, key, anchor, jnp.zeros((self.table.past.shape[1], *latents.shape), jnp.float32))

    def step(self, predict: Callable, state: State, i, times, *, noise=None) -> State:
        """One network call and what follows from it; `noise` replaces the draw."""
        row = {name: jnp.asarray(column)[i] for name, column in self.table.arrays.items()}
        x, key = state.latents.astype(jnp.float32), state.key
        t = jnp.broadcast_to(jnp.asarray(times)[i], x.shape[:1])
        fed = (row["input_scale"] * x).astype(state.latents.dtype)
        out = predict(fed, t)[..., : x.shape[-1]].astype(jnp.float32)
        m = row["m_x"] * x + row["m_out"] * out
        m = jnp.clip(m, -1, 1) if self.table.clip else m
        new = row["keep"] * x + row["now"] * m + row["raw"] * out
        new = new + jnp.einsum("k,k...->...", row["past"], state.slots)
        anchor = state.anchor
        if anchor is not None:
            anchor = jnp.where(jnp.asarray(self.table.anchors)[i], state.latents, anchor)
            new = new + row["anchored"] * anchor.astype(jnp.float32)
        if self.table.noise.any():
            key, (noise,) = draw(key, noise, x)
            new = new + row["noise"] * noise
        here = jnp.arange(len(state.slots)) == jnp.asarray(self.table.write)[i]
        slots = jnp.where(here.reshape((-1,) + (1,) * x.ndim), m, state.slots)
        return State(new.astype(state.latents.dtype), key, anchor, slots)
