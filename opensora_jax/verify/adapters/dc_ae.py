"""The high-compression autoencoder of Open-Sora 2.0: latents and pixels, whole and in tiles."""

import numpy as np

from opensora_jax.vaes.dc_ae import latent_size
from opensora_jax.verify.adapters.hunyuan_vae import recorded
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("vaes", "dc_ae", config=case.config.get("effective", case.config))
    given = {name: channels_last(value) for name, value in case.tensors(run).items()}
    outputs = {}
    if "x" in given:
        z, inner = recorded(lambda p, x: net(p, x, method="encode"), case, run)(params, given["x"])
        size = latent_size(cfg, *given["x"].shape[1:4])
        outputs |= {"z": channels_first(z), "latent_size": np.asarray(size), **inner}
    if "z" in given:
        decoded, inner = recorded(lambda p, z: net(p, z, method="decode"), case, run)(params, given["z"])
        # The reference goes sample by sample; its intermediates are those of the last one.
        outputs |= {"dec": channels_first(decoded)} | {name: value[-1:] for name, value in inner.items()}
    return outputs


FAMILIES = {"opensora2_dc_ae": Adapter("dc_ae", replay)}
