"""What training an autoencoder costs: reconstruction, perception, divergence, and an adversary (VQGAN, arXiv 2012.09841).

    terms = reconstruction(video, recon, cfg, perceptual=lpips)
    loss = terms["nll"] + divergence(posterior.kl(), cfg) + adversary(nll_of, logits_of, last_layer, step, cfg)[0]
    loss_d, terms_d = discriminator(real, fake, step, cfg)

All versions divide sums by the number of frames (B·T), the divergence by B. `log_variance` is a constant: the references
keep a parameter that no optimiser ever sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import adversarial
from opensora_jax.diffusion.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, started


@dataclass(frozen=True)
class Config:
    perceptual_weight: float = 0.1
    kl_weight: float = 1e-6
    log_variance: float = 0.0
    adversary_factor: float = 0.0  # 0: no adversary; scales both of its losses
    adversary_weight: float = 0.5  # of the autoencoder's adversarial loss, on top of the adaptive weight
    generator_start_step: int = 0
    discriminator_start_step: int = 0
    generator_loss: str = "hinge"
    discriminator_loss: str = "hinge"
    lecam_weight: float = 0.0
    gradient_penalty_weight: float = 0.0

    def __post_init__(self):
        for name, table in (("generator_loss", GENERATOR_LOSSES), ("discriminator_loss", DISCRIMINATOR_LOSSES)):
            if getattr(self, name) not in table:
                raise UserError(f"VAE {name} is {getattr(self, name)!r}; choose one of {', '.join(table)}")


V1_2 = Config()
V1_3 = Config(perceptual_weight=1.0, adversary_factor=1.0)
V2_0 = Config(perceptual_weight=0.5, kl_weight=0.0)
V2_0_ADVERSARIAL = Config(perceptual_weight=0.5, kl_weight=0.0, adversary_factor=1.0, adversary_weight=0.05)
PLAN_V1_0 = Config(
    perceptual_weight=1.0, adversary_factor=1.0, generator_start_step=2001, discriminator_start_step=2001
)


def reconstruction(video, recon, cfg: Config, *, perceptual: Callable | None = None, weights=None) -> dict:
    """Terms, each a sum over pixels divided by the frames; video, recon [B, T, H, W, C].

    `nll` is what the adversary's weight looks at, `weighted_nll` what training adds up (equal without `weights`,
    which broadcast against the video). `perceptual`: frames [N, H, W, C] twice → distances [N]; it counts at every
    pixel and channel of its frame.
    """
    frames = lambda x: x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
    count = video.shape[0] * video.shape[1]
    error = jnp.abs(video.astype(jnp.float32) - recon.astype(jnp.float32))
    terms = {"recon": error.sum() / count}
    if perceptual is not None and cfg.perceptual_weight > 0:
        distance = perceptual(frames(video), frames(recon)).reshape(*video.shape[:2], 1, 1, 1)
        terms["perceptual"] = distance.mean() * video[0, 0].size
        error = error + cfg.perceptual_weight * distance
    terms["pixels"] = error.mean()
    nll = error * jnp.exp(-cfg.log_variance) + cfg.log_variance
    terms["nll"] = nll.sum() / count
    terms["weighted_nll"] = terms["nll"] if weights is None else (weights * nll).sum() / count
    return terms


def divergence(kl, cfg: Config):
    """kl [B], each summed over its latents."""
    return cfg.kl_weight * kl.mean()


def adversary(nll_of: Callable, logits_of: Callable, last_layer, step, cfg: Config) -> tuple:
    """The autoencoder's adversarial loss and its terms.

    nll_of and logits_of: the decoder's last kernel → nll, → logits of the reconstruction; whatever else they close over
    gets gradients through the loss as usual. The loss weighs as much, at that kernel, as the reconstruction does.
    """
    loss_of = lambda kernel: GENERATOR_LOSSES[cfg.generator_loss](logits_of(kernel))
    loss = loss_of(last_layer)
    if not cfg.adversary_factor:
        return 0.0 * loss, {"g_loss": loss, "d_weight": jnp.float32(0), "disc_factor": jnp.float32(0)}
    weight = adversarial.adaptive_weight(jax.grad(nll_of)(last_layer), jax.grad(loss_of)(last_layer))
    weight = weight * cfg.adversary_weight
    factor = started(cfg.adversary_factor, step, cfg.generator_start_step)
    return weight * factor * loss, {"g_loss": loss, "d_weight": weight, "disc_factor": factor}


def discriminator(real, fake, step, cfg: Config, *, means=(0.0, 0.0), penalty=0.0) -> tuple:
    """The discriminator's loss and its terms from its logits.

    means: running means of real and fake logits for LeCam (see `running_means`); penalty: adversarial.gradient_penalty
    of the real clips, where its weight is not zero.
    """
    adv = DISCRIMINATOR_LOSSES[cfg.discriminator_loss](real, fake) * cfg.adversary_factor
    adv = started(adv, step, cfg.discriminator_start_step)
    lecam = cfg.lecam_weight * adversarial.lecam(real, fake, *means)
    return adv + lecam + cfg.gradient_penalty_weight * penalty, {"adv": adv, "lecam": lecam}


def running_means(means, real, fake, decay: float = 0.999):
    """The next running means of real and fake logits."""
    return tuple(m * decay + logits.mean() * (1 - decay) for m, logits in zip(means, (real, fake)))
