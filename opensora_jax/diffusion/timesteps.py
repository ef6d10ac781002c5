"""Time for rectified flows: how training draws it, and how size and duration shift it towards noise.

Large or long videos keep more signal at the same noise level, so every version bends time with
t' = a t / (1 + (a - 1) t), t in [0, 1], 1 = noise (SD3, arXiv 2403.03206, section 5.3.2); the versions differ in `a`:
Open-Sora 1.2 and 1.3 from pixels and frames (`PixelShift`), 2.0 from latent tokens (`TokenShift`) or a given number.

The shifts take numpy or jax arrays and answer in kind: samplers compute their schedule on the host in float32 with the
reference's order of operations, because its frame masks compare against these very roundings.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError


def shift_time(t, ratio):
    """t in [0, 1] bent towards 1 (noise) when ratio > 1."""
    return ratio * t / (1 + (ratio - 1) * t)


@dataclass(frozen=True)
class PixelShift:
    """Open-Sora 1.2, 1.3: a = sqrt(area / 512²) · sqrt(frames) · scale, from pixel `height, width, num_frames`.

    `frames` names the version's idea of a latent frame: "chunks" (1.2: five for each full 17, below 17 the latents there
    are), "full_chunks" (1.2 to the letter: none below 17, which ends in 0/0) or "quarter" (1.3: (n - 1) // 4). Quirks
    kept: only the first sample decides whether the batch is images; 1.3 (`scale_images` False) scales videos only, and
    takes everything for images when `temporal` is False.
    """

    frames: str = "chunks"
    scale: float = 1.0
    scale_images: bool = True
    temporal: bool = True
    base_area: int = 512 * 512
    base_frames: int = 1

    def __post_init__(self):
        if self.frames not in ("chunks", "full_chunks", "quarter"):
            raise UserError(
                f"PixelShift.frames is {self.frames!r}; it must be chunks, full_chunks (1.2) or quarter (1.3)"
            )

    def is_image(self, sizes: dict[str, Any]):
        return sizes["num_frames"][0] == 1 if self.temporal else True

    def ratio(self, sizes: dict[str, Any], shape: tuple[int, ...] | None = None):
        """`a` for each sample [B]; `shape` (of the latents) is not looked at."""
        missing = [name for name in ("height", "width", "num_frames") if name not in sizes]
        if missing:
            raise UserError(f"the timestep transform needs pixel sizes: the batch lacks {', '.join(missing)}")
        xp = jnp if any(isinstance(sizes[k], jax.Array) for k in ("height", "width", "num_frames")) else np
        height, width, count = (xp.asarray(sizes[k], xp.float32) for k in ("height", "width", "num_frames"))
        space = xp.sqrt(height * width / self.base_area)
        latent_frames = (count - 1) // 4 if self.frames == "quarter" else count // 17 * 5
        if self.frames == "chunks":
            latent_frames = xp.where(count < 17, xp.ceil(count / 4), latent_frames)
        image = self.is_image({"num_frames": count})
        latent_frames = xp.where(image, xp.float32(1), latent_frames)
        scale = self.scale if self.scale_images else xp.where(image, 1.0, self.scale).astype(xp.float32)
        return space * xp.sqrt(latent_frames / self.base_frames) * scale


@dataclass(frozen=True)
class TokenShift:
    """Open-Sora 2.0: a = lin(tokens of a frame) · sqrt(latent frames), lin through (256, 1), (4096, 3), unclamped.

    `tokens_per_patch`: latent pixels of a token. Training counts 4 for every network; sampling the network's own
    patch area, which is 1 for the DC-AE one. `alpha` (flow_shift of the configs) replaces the formula.
    """

    tokens_per_patch: int = 4
    alpha: float | None = None
    base: tuple[float, float] = (256, 1)
    top: tuple[float, float] = (4096, 3)

    def is_image(self, sizes: dict[str, Any]):
        return False

    def ratio(self, sizes: dict[str, Any], shape: tuple[int, ...] | None = None):
        if self.alpha is not None:
            return self.alpha
        if shape is None:
            raise UserError("TokenShift needs the shape of the latents, [B, T, H, W, C]")
        _, frames, height, width, _ = shape
        tokens = height * width // self.tokens_per_patch
        slope = (self.top[1] - self.base[1]) / (self.top[0] - self.base[0])
        return (slope * (tokens - self.base[0]) + self.base[1]) * math.sqrt(frames)


@dataclass(frozen=True)
class TimeSampling:
    """How training draws time in [0, 1): "uniform", "logit-normal", or whole steps ("discrete": 0…N-1 of N)."""

    method: str = "uniform"
    loc: float = 0.0
    scale: float = 1.0
    shift: PixelShift | TokenShift | None = None
    uniform_over: float | None = None  # 1.3: shifted times of videos above this are redrawn evenly in [it, 1)

    def __post_init__(self):
        if self.method not in ("uniform", "logit-normal", "discrete"):
            raise UserError(f"unknown time sampling {self.method!r}; choose uniform, logit-normal or discrete")


def sample_time(key, shape, cfg: TimeSampling, sizes, num_timesteps: int = 1000, *, draw=None, redraw=None):
    """Times [B] in units of `num_timesteps`; `draw` and `redraw` replace the random numbers (normal or uniform)."""
    key_draw, key_redraw = (None, None) if key is None else jax.random.split(key)
    batch = shape[0]
    if cfg.method == "logit-normal":
        draw = jax.random.normal(key_draw, (batch,)) if draw is None else draw
        t = jax.nn.sigmoid(cfg.loc + cfg.scale * draw)
    elif cfg.method == "uniform":
        t = jax.random.uniform(key_draw, (batch,)) if draw is None else draw
    else:
        draw = jax.random.randint(key_draw, (batch,), 0, num_timesteps) if draw is None else draw
        t = draw / num_timesteps
    if cfg.shift is not None:
        t = shift_time(t, cfg.shift.ratio(sizes, shape))
        if cfg.uniform_over is not None:
            redraw = jax.random.uniform(key_redraw, (batch,)) if redraw is None else redraw
            again = (t > cfg.uniform_over) & ~jnp.asarray(cfg.shift.is_image(sizes))
            t = jnp.where(again, redraw * (1 - cfg.uniform_over) + cfg.uniform_over, t)
    return t * num_timesteps


def euler_schedule(steps: int, num_timesteps: int, batch: int, *, shift=None, sizes=None, shape=None, discrete=False):
    """Host table [steps + 1, B] of the times an Euler solver visits, `num_timesteps` (noise) down to 0 (data)."""
    times = [(1.0 - i / steps) * num_timesteps for i in range(steps)]
    if discrete:
        times = [round(t) for t in times]
    table = np.repeat(np.asarray(times, np.float32)[:, None], batch, axis=1)
    if shift is not None:
        host = {k: np.asarray(v) for k, v in (sizes or {}).items() if k in ("height", "width", "num_frames")}
        ratio = np.float32(shift.ratio(host, shape))
        table = shift_time(table / np.float32(num_timesteps), ratio) * np.float32(num_timesteps)
    return np.concatenate([table, np.zeros((1, batch), np.float32)])
