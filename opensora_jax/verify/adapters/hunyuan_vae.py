"""The video autoencoder of Open-Sora 2.0: posterior, latents and pixels, whole and in tiles."""

import jax
import numpy as np

from opensora_jax.nn import taps
from opensora_jax.vaes.hunyuan_vae import latent_size
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("vaes", "hunyuan_vae")
    given = {name: channels_last(value) for name, value in case.tensors(run).items()}
    outputs = {}
    if "x" in given:
        posterior, inner = recorded(lambda p, x: net(p, x, method="posterior"), case, run)(params, given["x"])
        scaled = lambda z: channels_first((z - cfg.shift_factor) * cfg.scale_factor)
        outputs |= {"mean": channels_first(posterior.mean), "logvar": channels_first(posterior.logvar)}
        outputs |= {"kl": posterior.kl(), "z_mode": scaled(posterior.mean), **inner}
        outputs["latent_size"] = np.asarray(latent_size(cfg, *given["x"].shape[1:4]))
        if "noise" in given:
            outputs["z_sample"] = scaled(posterior.sample(noise=given["noise"]))
    if "z" in given:
        decoded, inner = recorded(lambda p, z: net(p, z, method="decode"), case, run)(params, given["z"])
        outputs |= {"dec": channels_first(decoded), **inner}
    return outputs


def recorded(run_network, case: Case, run: str):
    """The network under jit, with the intermediates that the case records."""
    wanted = [name for name in case.recorded(run) if name.startswith("inter.")]

    @jax.jit
    def forward(params, x):
        if not wanted:
            return run_network(params, x), {}
        with taps.record() as seen:
            out = run_network(params, x)
        return out, {f"inter.{name}": value for name, value in seen.items() if f"inter.{name}" in wanted}

    def call(params, x):
        out, inner = forward(params, x)
        return out, {name: channels_first(value) for name, value in inner.items()}

    return call


FAMILIES = {"opensora2_hunyuan_vae": Adapter("hunyuan_vae", replay)}
