"""The video autoencoder of Open-Sora 1.2 (VideoAutoencoderPipeline)."""

import jax

from opensora_jax.vaes.video_vae import latent_size
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay(case: Case, run: str) -> dict:
    net, params, _ = case.load("vaes", "video_vae")
    x = channels_last(case.tensors(run)["x"])

    @jax.jit
    def there_and_back(params, x):
        vae = net.module(params)
        x_z = vae.encode_frames(x)
        z = vae.encode(x)
        if case.config.get("cal_loss"):  # training looks at latents before shift and scale
            whole = vae(x)
            return whole.x_z, whole.z, whole.x_rec, whole.x_z_rec
        return x_z, z, vae.decode(z, num_frames=x.shape[1]), vae.decode_time(vae.denormalise(z), x.shape[1])

    names = ("x_z", "z", "x_rec", "x_z_rec")
    return {name: channels_first(array) for name, array in zip(names, there_and_back(params, x))}


def tables(case: Case):
    cfg = case.load("vaes", "video_vae")[2]
    for size, recorded in case.data.get("get_latent_size", ()):
        yield f"latent_size{size}", list(latent_size(cfg, *size)), recorded


FAMILIES = {"video_vae_v12": Adapter("video_vae", replay, tables)}
