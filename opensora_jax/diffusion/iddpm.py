"""Gaussian diffusion as Open-Sora 1.0-1.3, Open-Sora-Plan and DiT train it: IDDPM (arXiv 2102.09672).

The network predicts the noise and, in as many channels again, where the log variance lies between its two bounds. The
loss is the squared error of the noise plus the variational bound, which here teaches the variance only.

    loss, metrics = iddpm.loss(model_fn, batch, key, V1_1)

Tables are made on the host: in float64 (1.0, Open-Sora-Plan), or from betas rounded to float32 after respacing (1.1 on).
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion.masking import mean_per_sample, over_frames
from opensora_jax.diffusion.rectified_flow import conditioning


@dataclass(frozen=True)
class Config:
    schedule: str = "linear"
    diffusion_steps: int = 1000
    respacing: str = ""  # "" all steps; "100" evenly spread; "10,15,20" by section; "ddim50" whole strides
    predict: str = "noise"  # or "x0"
    variance: str = "learned_range"  # or learned, fixed_small, fixed_large
    loss: str = "mse"  # or rescaled_mse, kl, rescaled_kl
    float32_tables: bool = False
    speed: bool = False  # iddpm-speed (SpeeD, arXiv 2405.17403): times and weights where noise changes
    dropout: tuple[tuple[str, float], ...] = field(default=())  # see rectified_flow.Config

    def __post_init__(self):
        for name, allowed in {
            "predict": ("noise", "x0"),
            "variance": ("learned_range", "learned", "fixed_small", "fixed_large"),
            "loss": ("mse", "rescaled_mse", "kl", "rescaled_kl"),
        }.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"iddpm {name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    @property
    def learned(self) -> bool:
        return self.variance in ("learned_range", "learned")


V1_0 = Config(dropout=(("drop_text", 0.1),))
V1_1 = Config(float32_tables=True, dropout=(("drop_text", 0.1),))
PLAN_V1_0 = Config()


def betas(schedule: str, steps: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Noise added by each step; start and end default to 1e-4 and 0.02, scaled to the number of steps."""
    scale = 1000 / steps
    start, end = scale * 1e-4 if start is None else start, scale * 0.02 if end is None else end
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule in ("quad", "scaled_linear"):
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "const":
        return np.full(steps, end)
    if schedule == "jsd":
        return 1.0 / np.linspace(steps, 1, steps)
    if schedule in ("warmup10", "warmup50"):
        rising = int(steps * int(schedule[-2:]) / 100)
        return np.concatenate([np.linspace(start, end, rising), np.full(steps - rising, end)])
    if schedule == "squaredcos_cap_v2":
        at = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.array([min(1 - at((i + 1) / steps) / at(i / steps), 0.999) for i in range(steps)])
    raise UserError(
        f"unknown beta schedule {schedule!r}; choose linear, quad, const, jsd, warmup10, warmup50 or squaredcos_cap_v2"
    )


def spaced_steps(total: int, respacing: str) -> list[int]:
    """Which of the original steps a respaced process keeps."""
    if respacing.startswith("ddim"):
        count = int(respacing[4:])
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise UserError(f"no whole stride makes {count} steps of {total}; use {count} instead of {respacing}")
    sections = [int(part) for part in respacing.split(",")] if respacing else [total]
    size, extra = divmod(total, len(sections))
    kept, start = [], 0
    for i, count in enumerate(sections):
        length = size + (i < extra)
        if length < count:
            raise UserError(f"respacing {respacing!r} asks for {count} steps of a section of {length}")
        stride = 1 if count <= 1 else (length - 1) / (count - 1)
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += length
    return sorted(set(kept))


@dataclass(frozen=True)
class Tables:
    """Of the respaced process, one entry a step; `timestep_map` has the original times, which the network is told."""

    timestep_map: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.betas)

    @property
    def sqrt_alphas_cumprod(self):
        return np.sqrt(self.alphas_cumprod)

    @property
    def sqrt_one_minus_alphas_cumprod(self):
        return np.sqrt(1 - self.alphas_cumprod)

    @property
    def log_one_minus_alphas_cumprod(self):
        return np.log(1 - self.alphas_cumprod)

    @property
    def sqrt_recip_alphas_cumprod(self):
        return np.sqrt(1 / self.alphas_cumprod)

    @property
    def sqrt_recipm1_alphas_cumprod(self):
        return np.sqrt(1 / self.alphas_cumprod - 1)


@lru_cache
def tables(cfg: Config) -> Tables:
    kept = spaced_steps(cfg.diffusion_steps, cfg.respacing)
    cumulative = np.cumprod(1 - betas(cfg.schedule, cfg.diffusion_steps))[kept]
    beta = 1 - cumulative / np.concatenate([[1.0], cumulative[:-1]])
    beta = beta.astype(np.float32 if cfg.float32_tables else np.float64)
    bar = np.cumprod(1 - beta, dtype=np.float64).astype(beta.dtype)  # torch too sums float32 in double on the CPU
    one, zero = np.ones(1, beta.dtype), np.zeros(1, beta.dtype)
    before = np.concatenate([one, bar[:-1]])
    posterior = beta * (1 - before) / (1 - bar)
    clipped = np.concatenate([posterior[1:2], posterior[1:]]) if len(beta) > 1 else beta  # the first one is zero
    return Tables(
        timestep_map=np.array(kept),
        betas=beta,
        alphas_cumprod=bar,
        alphas_cumprod_prev=before,
        alphas_cumprod_next=np.concatenate([bar[1:], zero]),
        posterior_variance=posterior,
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=beta * np.sqrt(before) / (1 - bar),
        posterior_mean_coef2=(1 - before) * np.sqrt(1 - beta) / (1 - bar),
    )


def at(table: np.ndarray, t, like):
    """Entries of a table for steps t [B], float32, against [B, T, H, W, C]."""
    return jnp.asarray(table, jnp.float32)[t].reshape((-1,) + (1,) * (like.ndim - 1))


def q_sample(x, t, noise, cfg: Config):
    """x at step t of the forward process."""
    tab = tables(cfg)
    return at(tab.sqrt_alphas_cumprod, t, x) * x + at(tab.sqrt_one_minus_alphas_cumprod, t, x) * noise


def x0_from_noise(x_t, t, noise, cfg: Config):
    tab = tables(cfg)
    return at(tab.sqrt_recip_alphas_cumprod, t, x_t) * x_t - at(tab.sqrt_recipm1_alphas_cumprod, t, x_t) * noise


def noise_from_x0(x_t, t, x0, cfg: Config):
    tab = tables(cfg)
    return (at(tab.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x0) / at(tab.sqrt_recipm1_alphas_cumprod, t, x_t)


def posterior_mean(x0, x_t, t, cfg: Config):
    """Mean of q(x_{t-1} | x_t, x_0)."""
    tab = tables(cfg)
    return at(tab.posterior_mean_coef1, t, x_t) * x0 + at(tab.posterior_mean_coef2, t, x_t) * x_t


def log_variance(output, x, t, cfg: Config):
    """Of p(x_{t-1} | x_t): from the second half of the output's channels when learned, else from the tables."""
    tab = tables(cfg)
    if cfg.variance == "learned":
        return output[..., x.shape[-1] :]
    low = at(tab.posterior_log_variance_clipped, t, x)
    if cfg.variance == "learned_range":
        part = (output[..., x.shape[-1] :] + 1) / 2
        return part * at(np.log(tab.betas), t, x) + (1 - part) * low
    if cfg.variance == "fixed_small":
        return jnp.broadcast_to(low, x.shape)
    large = np.concatenate([tab.posterior_variance[1:2], tab.betas[1:]])
    return jnp.broadcast_to(at(np.log(large), t, x), x.shape)


def p_mean_variance(output, x, t, cfg: Config, *, clip: bool = False) -> dict:
    """Mean and log variance of the reverse step, and x_0 as the output has it (clipped to [-1, 1] on demand)."""
    predicted = output[..., : x.shape[-1]]
    x0 = predicted if cfg.predict == "x0" else x0_from_noise(x, t, predicted, cfg)
    x0 = jnp.clip(x0, -1, 1) if clip else x0
    return {"mean": posterior_mean(x0, x, t, cfg), "log_variance": log_variance(output, x, t, cfg), "x0": x0}


def _normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (-1 + logvar2 - logvar1 + jnp.exp(logvar1 - logvar2) + jnp.square(mean1 - mean2) * jnp.exp(-logvar2))


def _discrete_log_likelihood(x, mean, log_scale):
    """Log probability of x in a Gaussian cut into 256 levels over [-1, 1]."""
    cdf = lambda v: 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    log = lambda p: jnp.log(jnp.maximum(p, 1e-12))
    centered, inverse = x - mean, jnp.exp(-log_scale)
    above, below = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
    return jnp.where(x < -0.999, log(above), jnp.where(x > 0.999, log(1 - below), log(above - below)))


def variational_bound(output, x0, x_t, t, cfg: Config, *, x_mask=None, clip: bool = False):
    """One term of the bound in bits a dimension [B]: KL to the posterior, at step 0 the likelihood of the data."""
    ours = p_mean_variance(output, x_t, t, cfg, clip=clip)
    goal = at(tables(cfg).posterior_log_variance_clipped, t, x_t)
    kl = _normal_kl(posterior_mean(x0, x_t, t, cfg), goal, ours["mean"], ours["log_variance"])
    nll = -_discrete_log_likelihood(x0, ours["mean"], 0.5 * ours["log_variance"])
    bits = lambda v: mean_per_sample(v, x_mask) / math.log(2)
    return jnp.where(t == 0, bits(nll), bits(kl))


def loss(model_fn, batch: dict, key, cfg: Config, *, noise=None, t=None, weights=None):
    """Training loss -> (scalar, metrics); the network gets the original times of the respaced steps t [B].

    Quirk kept: condition frames (x_mask False) enter with the noise of step 0, not clean. `weights` weigh the squared
    error by step; `noise` and `t` replace the draws.
    """
    x, x_mask, tab = batch["latents"].astype(jnp.float32), batch.get("x_mask"), tables(cfg)
    key_t, key_noise, key_drop = (None,) * 3 if key is None else jax.random.split(key, 3)
    if cfg.speed:
        weights = jnp.asarray(speed_weights(cfg), jnp.float32) if weights is None else weights
    if t is None:
        t = speed_steps(key_t, len(x), cfg) if cfg.speed else jax.random.randint(key_t, (len(x),), 0, tab.steps)
    noise = jax.random.normal(key_noise, x.shape, jnp.float32) if noise is None else noise
    x_t = q_sample(x, t, noise, cfg)
    if x_mask is not None:
        x_t = jnp.where(over_frames(x_mask, x), x_t, q_sample(x, jnp.zeros_like(t), noise, cfg))
    times = jnp.asarray(tab.timestep_map)[t]
    named = conditioning(batch, cfg, key_drop)
    output = model_fn(x_t.astype(batch["latents"].dtype), times, **named).astype(jnp.float32)
    if cfg.loss in ("kl", "rescaled_kl"):
        bound = variational_bound(output, x, x_t, t, cfg, x_mask=x_mask)
        per_sample = bound * (tab.steps if cfg.loss == "rescaled_kl" else 1)
        return per_sample.mean(), {"loss_per_sample": per_sample, "vb": per_sample, "t": t}
    predicted, rest = output[..., : x.shape[-1]], output[..., x.shape[-1] :]
    error = jnp.square((noise if cfg.predict == "noise" else x) - predicted)
    if weights is not None:
        error = error * at(weights, t, x)
    terms = {"mse": mean_per_sample(error, x_mask)}
    if cfg.learned:  # the bound moves the variance only: the mean is frozen
        frozen = jnp.concatenate([jax.lax.stop_gradient(predicted), rest], -1)
        scale = tab.steps / 1000 if cfg.loss == "rescaled_mse" else 1.0
        terms["vb"] = variational_bound(frozen, x, x_t, t, cfg, x_mask=x_mask) * scale
    per_sample = sum(terms.values())
    return per_sample.mean(), {"loss_per_sample": per_sample, **terms, "t": t}


def bits_per_dimension(model_fn, batch: dict, key, cfg: Config, *, noise=None) -> dict:
    """The whole bound [B], its terms by step and the prior's; `noise` [steps, B, ...] replaces the draws."""
    x, tab = batch["latents"].astype(jnp.float32), tables(cfg)
    named = conditioning(batch, cfg, None)
    vb, x0_mse, mse = [], [], []
    for step in reversed(range(tab.steps)):
        t = jnp.full(len(x), step)
        drawn = jax.random.normal(jax.random.fold_in(key, step), x.shape) if noise is None else noise[step]
        x_t = q_sample(x, t, drawn, cfg)
        output = model_fn(x_t, jnp.asarray(tab.timestep_map)[t], **named).astype(jnp.float32)
        x0 = p_mean_variance(output, x_t, t, cfg, clip=True)["x0"]
        vb.append(variational_bound(output, x, x_t, t, cfg, clip=True))
        x0_mse.append(mean_per_sample(jnp.square(x0 - x)))
        mse.append(mean_per_sample(jnp.square(noise_from_x0(x_t, t, x0, cfg) - drawn)))
    last = float(tab.alphas_cumprod[-1])
    prior = mean_per_sample(_normal_kl(math.sqrt(last) * x, math.log(1 - last), 0.0, 0.0)) / math.log(2)
    terms = {name: jnp.stack(v, 1) for name, v in {"vb": vb, "x0_mse": x0_mse, "mse": mse}.items()}
    return {"total": terms["vb"].sum(1) + prior, "prior": prior, **terms}


@lru_cache
def _speed(cfg: Config) -> tuple[int, np.ndarray]:
    """First step past which noise hardly grows, and the probability of drawing each step."""
    slope = np.gradient(tables(cfg).sqrt_one_minus_alphas_cumprod)
    p = np.tanh(1e6 * (slope - 1e-4)) + 1.5
    return int(np.argmax(slope < 5e-5)) + 1, p / p.sum()


def speed_weights(cfg: Config) -> np.ndarray:
    """1 / (1 + signal-to-noise ratio) of each step, which is its share of noise."""
    bar = tables(cfg).alphas_cumprod
    return 1 / (1 + (1 / (1 - bar) - 1))


def speed_steps(key, batch: int, cfg: Config, *, draw=None):
    """Steps [B]: half drawn where noise grows fast more often, half their mirror images; `draw` replaces the draw."""
    first, p = _speed(cfg)
    if draw is None:
        draw = jax.random.categorical(key, jnp.log(jnp.asarray(p, jnp.float32)), shape=(batch // 2 + 1,))
    mirror = jnp.where(draw < first, first - draw, draw - first)
    return jnp.concatenate([draw, mirror])[:batch]
