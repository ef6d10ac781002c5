"""The frame-by-frame image autoencoder of Open-Sora 1.0 and 1.1 (VideoAutoencoderKL)."""

import jax

from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay(case: Case, run: str) -> dict:
    kl = case.config["autoencoder_kl"]
    # Open-Sora scales by its own factor, whatever the checkpoint of the image VAE says.
    kl = kl | {"scaling_factor": case.config.get("scaling_factor", 0.18215), "shift_factor": 0.0}
    micro = case.config.get("micro_batch_size")
    net, params, _ = case.load("vaes", "sd_vae", config=kl, prefix="module.", micro_batch_size=micro)
    given = case.tensors(run)
    noise = channels_last(given.get("noise"))
    z = jax.jit(lambda p, x: net(p, x, noise=noise, method="encode"))(params, channels_last(given["x"]))
    x_rec = jax.jit(lambda p, z: net(p, z, method="decode"))(params, z)
    return {"z": channels_first(z), "x_rec": channels_first(x_rec)}


FAMILIES = {"sd_vae": Adapter("sd_vae", replay)}
