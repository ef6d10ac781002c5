"""DPM-Solver++ of second order (arXiv 2211.01095): multistep as Open-Sora 1.x runs it, multi- and singlestep as diffusers do.

The network predicts noise; the solver remembers the data that the noise implies. In log signal-to-noise λ a step is
x ← (σ'/σ) x - α' (e^-h - 1) (D0 + D1 / 2), h = λ' - λ, D1 the slope of the remembered data.
"""

from functools import lru_cache

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion.iddpm import betas
from opensora_jax.sampling.linear import Linear, Table


def _data(alpha, sigma) -> dict:
    """Data from noise: (x - σ out) / α."""
    return {"m_x": 1 / alpha, "m_out": -sigma / alpha}


def _first(alpha, sigma, alpha_next, sigma_next) -> tuple[float, float]:
    """Coefficients of x and of the data; the last step to σ' = 0 is the data itself."""
    ratio = (sigma_next / alpha_next) / (sigma / alpha)  # e^-h
    return sigma_next / sigma, -alpha_next * (ratio - 1)


def multistep(times, alpha, sigma, second: list[bool]) -> Linear:
    """times, alpha, sigma of steps + 1 points, noise first; `second`: which steps use the slope."""
    n = len(times) - 1
    lam = np.log(alpha) - np.log(np.maximum(sigma, 1e-300))
    keep, now, past = np.zeros(n), np.zeros(n), np.zeros((n, 1))
    for i in range(n):
        keep[i], now[i] = _first(alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
        if second[i]:
            half = 0.5 * now[i] * (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])
            now[i], past[i, 0] = now[i] + half, -half
    columns = _data(alpha[:-1], sigma[:-1]) | dict(keep=keep, now=now, past=past, write=0)
    return Linear(Table.of(times[:-1], slots=1, **columns))


@lru_cache
def open_sora(steps: int = 20, *, order: int = 2, spacing: str = "time_uniform", always_lower: bool = False) -> Linear:
    """ "dpm-solver" of Open-Sora 1.0-1.3, on 1000 linear betas taken as continuous time (0, 1].

    The last step is of first order below ten steps; in 1.3 (`always_lower`) always. spacing: time_uniform, logSNR or
    time_quadratic.
    """
    if order not in (1, 2) or steps < order:
        raise UserError(
            f"DPM-Solver of order {order} in {steps} steps: the order is 1 or 2, the steps at least as many"
        )
    log_alpha = 0.5 * np.cumsum(np.log(1 - betas("linear", 1000)))
    grid = np.linspace(0, 1, 1001)[1:]
    lam = log_alpha - 0.5 * np.log(1 - np.exp(2 * log_alpha))
    if spacing == "time_uniform":
        t = np.linspace(1.0, 1e-3, steps + 1)
    elif spacing == "time_quadratic":
        t = np.linspace(1.0, 1e-3**0.5, steps + 1) ** 2
    elif spacing == "logSNR":
        wanted = np.linspace(lam[-1], lam[0], steps + 1)
        t = np.interp(-0.5 * np.logaddexp(0, -2 * wanted), log_alpha[::-1], grid[::-1])
    else:
        raise UserError(f"unknown DPM-Solver spacing {spacing!r}; choose time_uniform, logSNR or time_quadratic")
    at = np.interp(t, grid, log_alpha)
    alpha, sigma = np.exp(at), np.sqrt(1 - np.exp(2 * at))
    second = [order == 2 and i > 0 for i in range(steps)]
    if always_lower or steps < 10:
        second[-1] = False
    return multistep((t - 1e-3) * 1000, alpha, sigma, second)


def diffusers_multistep(times, alpha, sigma) -> Linear:
    """DPMSolverMultistepScheduler: the last point is σ = 0, reached in first order."""
    n = len(times) - 1
    return multistep(times, alpha, sigma, [0 < i < n - 1 for i in range(n)])


def diffusers_singlestep(times, alpha, sigma) -> Linear:
    """DPMSolverSinglestepScheduler: pairs of a first-order step and a second-order one over both, from the same start."""
    n = len(times) - 1
    lam = np.log(alpha) - np.log(np.maximum(sigma, 1e-300))
    keep, anchored, now, past = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros((n, 1))
    orders = [1, 2] * ((n - 1) // 2) + [1] * (2 - n % 2)
    for i in range(n):
        if orders[i] == 1:
            keep[i], now[i] = _first(alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
            continue
        anchored[i], data = _first(alpha[i - 1], sigma[i - 1], alpha[i + 1], sigma[i + 1])
        half = 0.5 * data * (lam[i + 1] - lam[i - 1]) / (lam[i] - lam[i - 1])
        now[i], past[i, 0] = half, data - half
    anchors = np.array(orders) == 1
    columns = _data(alpha[:-1], sigma[:-1]) | dict(keep=keep, anchored=anchored, now=now, past=past, anchors=anchors)
    return Linear(Table.of(times[:-1], slots=1, write=0, **columns))
