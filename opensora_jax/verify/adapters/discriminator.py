"""PatchGAN discriminators over frames (Open-Sora-Plan) and over clips (Open-Sora 1.2, 1.3)."""

import jax

from opensora_jax.diffusion import adversarial
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay_plan(case: Case, run: str) -> dict:
    net, params, cfg = case.load("vaes", "discriminator")
    given = {name: channels_last(value) for name, value in case.tensors(run).items()}
    if cfg.rank == 2:  # frames by themselves
        given = {name: value[:, None] for name, value in given.items()}
    real, fake = net(params, given["real"]), net(params, given["fake"])
    train, moved = jax.jit(lambda x: net(params, x, method="train_step"))(given["real"])
    running = {
        f"updated.main.{i}.running_{name}": value for i, norm in moved["main"].items() for name, value in norm.items()
    }
    return {
        "eval_logits": channels_first(real),
        "eval_logits_fake": channels_first(fake),
        "train_logits": channels_first(train),
        "g_loss": adversarial.generator(fake),
        "hinge_d_loss": adversarial.hinge(real, fake),
        "vanilla_d_loss": adversarial.vanilla(real, fake),
        **running,
    }


def replay_clips(case: Case, run: str) -> dict:
    net, params, _ = case.load("vaes", "discriminator")
    x = channels_last(case.tensors(run)["x"])
    out, (train, _) = jax.jit(lambda x: (net(params, x), net(params, x, method="train_step")))(x)
    return {"out": channels_first(out), "train_mode_out": channels_first(train)}


FAMILIES = {
    "osp_discriminator": Adapter("discriminator", replay_plan),
    "discriminator3d_v12": Adapter("discriminator", replay_clips),
    "discriminator3d_v13": Adapter("discriminator", replay_clips),
}
