"""Rectified flow (arXiv 2209.03003): straight paths from data to noise, the network predicts their velocity.

Open-Sora 1.2 and 1.3 count time 0…1000 and predict data - noise; 2.0 counts 0…1, predicts noise - data, and leaves
a trace `sigma_min` of noise in the data. `V1_2`, `V1_3` and `V2_0` are the training settings of the releases.

    loss, metrics = rectified_flow.loss(model_fn, batch, key, V1_2)
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from opensora_jax.diffusion.masking import mean_per_sample, over_frames
from opensora_jax.diffusion.timesteps import PixelShift, TimeSampling, TokenShift, sample_time

# What a batch carries beside the conditioning that goes to the network by name.
NOT_CONDITIONING = ("latents", "clean_latents", "frame_weights", "video", "text_tokens", "id", "meta")


@dataclass(frozen=True)
class Config:
    time: TimeSampling = field(default_factory=TimeSampling)
    num_timesteps: int = 1000
    toward_data: bool = True  # the target is data - noise; False: noise - data
    sigma_min: float = 0.0
    dropout: tuple[tuple[str, float], ...] = ()  # (argument of the network, probability): a [B] bool drawn for each
    clean_over: float | None = None  # 1.3 noise augmentation: samples at later times start from `clean_latents`


_TEXT = (("drop_text", 0.1),)
V1_2 = Config(TimeSampling("logit-normal", shift=PixelShift("chunks")), dropout=_TEXT)
V1_3 = Config(TimeSampling("logit-normal", shift=PixelShift("quarter", scale_images=False)), dropout=_TEXT)
V2_0 = Config(
    TimeSampling("logit-normal", shift=TokenShift()),
    num_timesteps=1,
    toward_data=False,
    sigma_min=1e-5,
    dropout=(("drop_text", 0.1**0.5), ("drop_vec", 0.1**0.5)),
)


def add_noise(x, noise, t, num_timesteps: int = 1000, sigma_min: float = 0.0):
    """The point of the path at time t [B]: data at 0, noise at num_timesteps."""
    data = (1 - t.astype(jnp.float32) / num_timesteps).reshape((-1,) + (1,) * (x.ndim - 1))
    return data * x + (1 - (1 - sigma_min) * data) * noise


def target(x, noise, cfg: Config):
    return x - noise if cfg.toward_data else (1 - cfg.sigma_min) * noise - x


def conditioning(batch: dict, cfg: Config, key) -> dict:
    """The network's arguments: what the batch has, and which samples lose theirs (the batch may say so itself)."""
    named = {name: value for name, value in batch.items() if name not in NOT_CONDITIONING}
    for i, (name, probability) in enumerate(cfg.dropout):
        if name not in named and key is not None:
            draw = jax.random.uniform(jax.random.fold_in(key, i), batch["latents"].shape[:1])
            named[name] = draw < probability
    return named


def loss(model_fn, batch: dict, key, cfg: Config, *, noise=None, t=None, weights=None):
    """Mean squared error of the velocity over the frames to generate -> (scalar, metrics).

    A channel half beyond the latents' own (learned sigma of the older networks) is ignored. Condition frames (x_mask
    False) enter clean; `frame_weights` [B, T] weigh the rest; with `clean_latents` (1.3) they are the target.
    `weights` [N + 1] weigh a sample by its whole time step; `noise` and `t` replace the draws; without a key nothing is
    dropped.
    """
    x, x_mask, clean = batch["latents"], batch.get("x_mask"), batch.get("clean_latents")
    key_t, key_noise, key_drop = (None,) * 3 if key is None else jax.random.split(key, 3)
    t = sample_time(key_t, x.shape, cfg.time, batch, cfg.num_timesteps) if t is None else t
    noise = jax.random.normal(key_noise, x.shape, jnp.float32) if noise is None else noise
    start = x
    if cfg.clean_over is not None:
        start = jnp.where((t > cfg.clean_over).reshape(-1, 1, 1, 1, 1), clean, x)
    x_t = add_noise(start, noise, t, cfg.num_timesteps, cfg.sigma_min)
    if x_mask is not None:
        still = add_noise(start, noise, jnp.zeros_like(t), cfg.num_timesteps, cfg.sigma_min)
        x_t = jnp.where(over_frames(x_mask, x), x_t, still)
    velocity = model_fn(x_t.astype(x.dtype), t, **conditioning(batch, cfg, key_drop))[..., : x.shape[-1]]
    goal = target((start if clean is None else clean).astype(jnp.float32), noise, cfg)
    error = jnp.square(velocity.astype(jnp.float32) - goal)
    if "frame_weights" in batch:
        error = error * over_frames(batch["frame_weights"], x)
    per_sample = mean_per_sample(error, x_mask)
    if weights is not None:
        per_sample = per_sample * weights[t.astype(jnp.int32)]
    return per_sample.mean(), {"loss_per_sample": per_sample, "t": t}
