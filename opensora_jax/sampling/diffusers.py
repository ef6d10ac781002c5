"""The ten schedulers that Open-Sora-Plan 1.0 samples with, as diffusers constructs them by default.

    solver = scheduler("PNDM", steps=50)

Quirks of those defaults kept: DDIM and DDPM clip the data to [-1, 1]; PNDM takes nine calls more than steps, Heun and
KDPM2Ancestral 2·steps - 1; these two assume betas from 0.00085 to 0.012, not the 1e-4 to 0.02 of training. In sigma space
(Euler, EulerAncestral, Heun, KDPM2Ancestral) the start is scaled by the first sigma and the network's input scaled back.
"""

from functools import lru_cache

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion.iddpm import betas
from opensora_jax.sampling.dpm_solver import diffusers_multistep, diffusers_singlestep
from opensora_jax.sampling.linear import Linear, Table
from opensora_jax.sampling.pndm import deis, pndm

NAMES = (
    "DDIM",
    "EulerDiscrete",
    "DDPM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "PNDM",
    "HeunDiscrete",
    "EulerAncestralDiscrete",
    "DEISMultistep",
    "KDPM2AncestralDiscrete",
)


@lru_cache
def scheduler(name: str, steps: int, *, beta_start: float | None = None, beta_end: float | None = None) -> Linear:
    """The solver that diffusers calls `{name}Scheduler()`, for this many steps of a process of 1000."""
    if name not in NAMES:
        raise UserError(f"unknown scheduler {name!r}; choose one of {', '.join(NAMES)}")
    if not 2 <= steps <= 1000:
        raise UserError(f"scheduler {name}: {steps} steps; choose 2 to 1000")
    low, high = (0.00085, 0.012) if name in ("HeunDiscrete", "KDPM2AncestralDiscrete") else (1e-4, 0.02)
    bar = np.cumprod(1 - betas("linear", 1000, beta_start or low, beta_end or high))
    if name == "DDIM":
        return _ddim(steps, bar)
    if name == "DDPM":
        return _ddpm(steps, bar)
    if name == "PNDM":
        return pndm(steps, bar)
    sigmas = np.sqrt((1 - bar) / bar)
    if name in ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"):
        times = np.linspace(0, 999, steps + 1).round()[::-1][:-1]
        final = sigmas[0] if name == "DEISMultistep" else 0.0
        sigma = np.append(np.interp(times, np.arange(1000), sigmas), final)
        alpha = 1 / np.sqrt(sigma**2 + 1)
        build = {"DPMSolverMultistep": diffusers_multistep, "DPMSolverSinglestep": diffusers_singlestep}.get(name, deis)
        return build(np.append(times, 0), alpha, sigma * alpha)
    times = np.linspace(0, 999, steps, dtype=np.float32)[::-1].astype(float)
    sigma = np.append(np.interp(times, np.arange(1000), sigmas), 0.0)
    if name == "EulerDiscrete":
        return _in_sigma_space(times, sigma[:-1], keep=1.0, now=np.diff(sigma))
    if name == "EulerAncestralDiscrete":
        up, down = _split(sigma)
        return _in_sigma_space(times, sigma[:-1], keep=1.0, now=down - sigma[:-1], noise=up)
    return _heun(times, sigma) if name == "HeunDiscrete" else _kdpm2_ancestral(times, sigma, np.log(sigmas))


def _in_sigma_space(times, sigma, **columns) -> Linear:
    """x = data + σ · noise, and m is the noise, so its coefficient is the change of σ."""
    return Linear(Table.of(times, input_scale=1 / np.sqrt(sigma**2 + 1), init_scale=float(sigma.max()), **columns))


def _split(sigma) -> tuple[np.ndarray, np.ndarray]:
    """Of each step to the next σ: the part that fresh noise makes, and the part that is stepped to."""
    here, there = sigma[:-1], sigma[1:]
    up = np.sqrt(there**2 * (here**2 - there**2) / here**2)
    return up, np.sqrt(np.maximum(there**2 - up**2, 0))


def _leading(steps: int, bar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times from noise to data, their ᾱ, and ᾱ one stride earlier (1 before the first)."""
    stride = len(bar) // steps
    t = (np.arange(steps) * stride)[::-1]
    return t, bar[t], np.where(t >= stride, bar[np.maximum(t - stride, 0)], 1.0)


def _ddim(steps: int, bar) -> Linear:
    t, a, b = _leading(steps, bar)
    data = {"m_x": 1 / np.sqrt(a), "m_out": -np.sqrt(1 - a) / np.sqrt(a)}
    return Linear(Table.of(t, clip=True, now=np.sqrt(b), raw=np.sqrt(1 - b), **data))


def _ddpm(steps: int, bar) -> Linear:
    t, a, b = _leading(steps, bar)
    beta = 1 - a / b
    noise = np.where(t > 0, np.sqrt(np.maximum((1 - b) / (1 - a) * beta, 1e-20)), 0.0)
    data = {"m_x": 1 / np.sqrt(a), "m_out": -np.sqrt(1 - a) / np.sqrt(a)}
    now, keep = np.sqrt(b) * beta / (1 - a), np.sqrt(a / b) * (1 - b) / (1 - a)
    return Linear(Table.of(t, clip=True, now=now, keep=keep, noise=noise, **data))


def _heun(times, sigma) -> Linear:
    """Each step but the last: an Euler step, then from the same start the mean of the slopes at both ends."""
    n = len(times)
    calls = 2 * n - 1
    first = np.arange(calls) % 2 == 0
    step = np.arange(calls) // 2
    change = np.diff(sigma)[step]
    at = np.where(first, sigma[step], sigma[step + 1])
    place = np.where(first, step, step + 1)
    return _in_sigma_space(
        times[place],
        at,
        slots=1,
        anchors=first,
        write=0,
        anchored=1.0,
        now=np.where(first, change, change / 2),
        past=np.where(first, 0.0, change / 2)[:, None],
    )


def _kdpm2_ancestral(times, sigma, log_sigmas) -> Linear:
    """A step to the middle of log σ, then from the same start, with the slope found there, down, and noise up."""
    n = len(times)
    up, down = _split(sigma)
    with np.errstate(divide="ignore"):
        middle = np.exp((np.log(sigma[:-1]) + np.log(down)) / 2)
    middle[-1] = 0.0
    middle_times = np.interp(np.log(np.maximum(middle, 1e-10)), log_sigmas, np.arange(1000))
    calls = 2 * n - 1
    first = np.arange(calls) % 2 == 0
    step = np.arange(calls) // 2
    return _in_sigma_space(
        np.where(first, times[step], middle_times[step]),
        np.where(first, sigma[step], middle[step]),
        anchors=first,
        anchored=1.0,
        now=np.where(first, middle[step] - sigma[step], down[step] - sigma[step]),
        noise=np.where(first, 0.0, up[step]),
    )
