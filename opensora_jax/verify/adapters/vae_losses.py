"""Losses of VAE training: Open-Sora 1.2 and 1.3, and LPIPSWithDiscriminator of Open-Sora-Plan."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import adversarial, vae_losses
from opensora_jax.vaes.posterior import Posterior
from opensora_jax.verify.case import Adapter, Case, channels_last


def settings(case: Case) -> vae_losses.Config:
    c = case.config
    return vae_losses.Config(
        perceptual_weight=c.get("perceptual_loss_weight") or 0.0,
        kl_weight=c["kl_loss_weight"],
        log_variance=c["logvar_init"],
        adversary_factor=c["discriminator_factor"],
        adversary_weight=c["generator_factor"],
        generator_start_step=c["generator_start"],
        discriminator_start_step=c["discriminator_start"],
        lecam_weight=c.get("lecam_loss_weight") or 0.0,
    )


def conv(x, kernel, padding: int = 1):
    """The recording's 3-d convolution: x [B, T, H, W, C], kernel as torch has it."""
    spec = ("NDHWC", "OIDHW", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), [(padding, padding)] * 3, dimension_numbers=spec)


def open_sora(case: Case, run: str) -> dict:
    given = {k: v if k in ("last_layer", "disc_w") else channels_last(v) for k, v in case.tensors(run).items()}
    given = {name: jnp.asarray(value) for name, value in given.items()}
    cfg = settings(case)
    penalty = adversarial.gradient_penalty(lambda x: conv(jnp.tanh(x), given["disc_w"]), given["video"])
    outputs = {"gradient_penalty": penalty}
    if run.startswith("disc_"):
        _, kind, step = run.split("_")
        means = case.config["lecam_ema_real"], case.config["lecam_ema_fake"]
        cfg = replace(cfg, discriminator_loss=kind)
        _, terms = vae_losses.discriminator(given["real_logits"], given["fake_logits"], int(step), cfg, means=means)
        outputs |= terms
    elif run.startswith("gen"):
        decode = lambda kernel: conv(given["feat"], kernel)
        nll_of = lambda kernel: jnp.abs(decode(kernel) - given["target"]).sum()
        logits_of = lambda kernel: conv(decode(kernel), given["disc_w"], padding=0)
        outputs |= {
            "nll": nll_of(given["last_layer"]),
            "fake_logits": np.moveaxis(logits_of(given["last_layer"]), -1, 1),
        }
        if run != "gen":
            # discriminator_factor belongs to the recorded discriminator losses; the generator had its own, 1.
            cfg = replace(cfg, generator_loss=run.removeprefix("gen_"), adversary_factor=1.0)
            at = lambda step: vae_losses.adversary(nll_of, logits_of, given["last_layer"], step, cfg)[0]
            outputs |= {"before_start": at(cfg.generator_start_step - 1), "weighted_gen_loss": at(10**6)}
    else:
        weights = given["nll_weights"][:, None] if run == "weighted" else None
        terms = vae_losses.reconstruction(given["video"], given["recon"], cfg, weights=weights)
        kl = vae_losses.divergence(Posterior.of(given["moments"]).kl(), cfg)
        outputs |= {"nll": terms["nll"], "weighted_nll": terms["weighted_nll"], "weighted_kl": kl}
    scalar = lambda value: jnp.reshape(value, (1,)) if jnp.ndim(value) == 0 else value
    return {name: scalar(value) for name, value in outputs.items()}


def plan(case: Case, run: str) -> dict:
    c, args = case.config, case.args(run)
    given = {k: v if k == "last_w" else channels_last(v) for k, v in case.tensors(run).items()}
    given = {name: jnp.asarray(value) for name, value in given.items()}
    cfg = vae_losses.Config(
        perceptual_weight=c.get("perceptual_weight", 1.0),
        kl_weight=c.get("kl_weight", 1.0),
        log_variance=c.get("logvar_init", 0.0),
        adversary_factor=c.get("disc_factor", 1.0),
        adversary_weight=c.get("disc_weight", 1.0),
        generator_start_step=c["disc_start"],
        discriminator_start_step=c["disc_start"],
        discriminator_loss=c.get("disc_loss", "hinge"),
    )
    net, params, _ = case.load("vaes", "discriminator", prefix="discriminator.")

    def judge(x):
        return net(params, x, method="train_step")[0] if args["train"] else net(params, x)

    decode = lambda kernel: jnp.einsum("bthwc,oc->bthwo", given["recon_in"], kernel)
    perceptual = lambda a, b: jnp.square(a - b).mean((1, 2, 3))
    terms_of = lambda kernel: vae_losses.reconstruction(given["inputs"], decode(kernel), cfg, perceptual=perceptual)
    kl = Posterior.of(given["moments"]).kl().mean()

    def generator_loss(kernel):
        nll_of, logits_of = (lambda k: terms_of(k)["nll"]), (lambda k: judge(decode(k)))
        adversarial_loss, log = vae_losses.adversary(nll_of, logits_of, kernel, args["step"], cfg)
        terms = terms_of(kernel)
        loss = terms["weighted_nll"] + cfg.kl_weight * kl + adversarial_loss
        log |= {"nll_loss": terms["nll"], "rec_loss": terms["pixels"], "kl_loss": kl, "total_loss": loss}
        return loss, log | {"logvar": jnp.float32(cfg.log_variance)}

    (loss, log), grad = jax.jit(jax.value_and_grad(generator_loss, has_aux=True))(given["last_w"])
    real, fake = judge(given["inputs"]), judge(decode(given["last_w"]))
    loss_d, _ = vae_losses.discriminator(real, fake, args["step"], cfg)
    log_d = {"disc_loss": loss_d, "logits_real": real.mean(), "logits_fake": fake.mean()}
    return {
        "loss_0": loss,
        "loss_1": loss_d,
        "grad_last_w": grad,
        **{f"log0.{name}": value for name, value in log.items()},
        **{f"log1.{name}": value for name, value in log_d.items()},
    }


FAMILIES = {
    "vae_losses_v12": Adapter("vae_losses", open_sora),
    "vae_losses_v13": Adapter("vae_losses", open_sora),
    "osp_vae_loss": Adapter("vae_losses", plan),
}
