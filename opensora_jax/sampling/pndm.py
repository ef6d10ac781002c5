"""PNDM (arXiv 2202.09778) and DEIS (2204.13902): multistep methods on the predicted noise, as diffusers builds them."""

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.sampling.linear import Linear, Table

_ADAMS = np.array([55, -59, 37, -9]) / 24  # Adams-Bashforth of fourth order, newest first
_RUNGE_KUTTA = np.array([1, 2, 2, 1]) / 6


def _transfer(bar, t: int, previous: int) -> tuple[float, float]:
    """Coefficients of x and of the noise in going from time t to `previous` (below 0: the first time's level)."""
    a, b = bar[t], bar[max(previous, 0)]
    return np.sqrt(b / a), -(b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))


def pndm(steps: int, bar: np.ndarray) -> Linear:
    """Three Runge-Kutta steps of four calls, then one call a step: steps + 9 calls. bar: ᾱ of the trained process."""
    if steps < 4:
        raise UserError(f"PNDM begins with three Runge-Kutta steps: {steps} steps are too few, take at least 4")
    ratio = len(bar) // steps
    grid = np.arange(steps) * ratio
    half = ratio // 2
    # The recorded noises: slots 0-3 hold the last of each whole step, 4 and 5 the two middle ones of Runge-Kutta.
    calls = 12 + steps - 3
    t, keep, anchored, now = np.zeros(calls), np.zeros(calls), np.zeros(calls), np.zeros(calls)
    past, write, anchors = np.zeros((calls, 6)), np.zeros(calls, int), np.zeros(calls, bool)
    last = np.repeat(grid[-4:], 2) + np.tile([0, half], 4)
    inner = np.repeat(last[:-1], 2)[1:-1]  # ascending times of the twelve inner calls
    starts = inner[::-1]
    for call in range(12):
        group, stage = divmod(call, 4)
        t[call] = starts[call]
        origin = starts[group * 4]
        target = starts[call] - (0 if stage % 2 else half)
        x, noise = _transfer(bar, origin, target)
        anchors[call] = stage == 0
        anchored[call] = x
        write[call] = (group, 4, 5, -1)[stage]
        if stage < 3:
            now[call] = noise
        else:
            now[call] = noise * _RUNGE_KUTTA[3]
            past[call, [group, 4, 5]] = noise * _RUNGE_KUTTA[:3]
    for k, time in enumerate(grid[:-3][::-1]):
        call = 12 + k
        t[call] = time
        keep[call], noise = _transfer(bar, time, time - ratio)
        now[call] = noise * _ADAMS[0]
        for age in (1, 2, 3):
            past[call, (3 + k - age) % 4] = noise * _ADAMS[age]
        write[call] = (3 + k) % 4
    columns = dict(keep=keep, anchored=anchored, now=now, past=past, anchors=anchors, write=write)
    return Linear(Table.of(t, slots=6, **columns))


def deis(times, alpha, sigma) -> Linear:
    """Second order in log ρ, ρ = σ / α; the first step, and below 15 steps the last, of first order."""
    n = len(times) - 1
    rho = sigma / alpha
    integral = lambda t, b, c: t * (np.log(t) - np.log(c) - 1) / (np.log(b) - np.log(c))
    now, past = np.zeros(n), np.zeros((n, 1))
    for i in range(n):
        if i == 0 or (i == n - 1 and n < 15):
            now[i] = alpha[i + 1] * (rho[i + 1] - rho[i])
            continue
        a, b, c = rho[i + 1], rho[i], rho[i - 1]
        now[i] = alpha[i + 1] * (integral(a, b, c) - integral(b, b, c))
        past[i, 0] = alpha[i + 1] * (integral(a, c, b) - integral(b, c, b))
    return Linear(Table.of(times[:-1], slots=1, keep=alpha[1:] / alpha[:-1], now=now, past=past, write=0))
