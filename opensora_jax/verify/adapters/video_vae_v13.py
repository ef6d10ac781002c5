"""The video autoencoder of Open-Sora 1.3 (OpenSoraVAE_V1_3_Pipline)."""

import jax

from opensora_jax.vaes.video_vae_v13 import latent_size
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

OPTIONS = {"micro_batch_size": None, "micro_frame_size": None, "temporal_overlap": False, "normalization": None}


def load(case: Case, run: str):
    """Each run may choose the options that shape no weights; the reference's defaults are "off"."""
    settings = case.config | case.runs[run] | case.args(run)
    return case.load("vaes", "video_vae_v13", **{key: settings.get(key, off) for key, off in OPTIONS.items()})


def replay(case: Case, run: str) -> dict:
    net, params, _ = load(case, run)
    given = case.tensors(run)
    name = case.runs[run].get("x", "x")
    x = channels_last(given[name])
    noise = channels_last(given.get("noise"))

    @jax.jit
    def there_and_back(params, x):
        vae = net.module(params)
        z = vae.encode(x, noise=noise)
        return z, vae.decode(z), *vae.posterior(x)

    arrays = there_and_back(params, x)
    return dict(zip(("z", "x_rec", "mean", "logvar"), map(channels_first, arrays)))


def tables(case: Case):
    for run, rows in case.data.get("get_latent_size_patch_4_8_8", {}).items():
        cfg = load(case, run)[2]
        for size, recorded in rows:
            yield f"{run} latent_size{size}", list(latent_size(cfg, *size, patch=(4, 8, 8))), recorded


FAMILIES = {"video_vae_v13": Adapter("video_vae_v13", replay, tables)}
