"""The image autoencoder of FLUX.1, which draws the first frame in Open-Sora 2.0's text → image → video: Stable
Diffusion's architecture with 16 channels and without quantisation convolutions, frame by frame.

Checkpoint: ae.safetensors (flux1-dev-ae.safetensors), or diffusers' vae/ folder, which vaes/sd_vae.py reads.
"""

from flax import nnx

from opensora_jax.vaes import sd_vae
from opensora_jax.vaes.sd_vae import Config, inputs, latent_size

__all__ = ["PRESETS", "REPOSITORIES", "Config", "build", "inputs", "latent_size"]

PRESETS = {
    "flux-ae": Config(
        latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159
    )
}
REPOSITORIES = {"flux-ae": "black-forest-labs/FLUX.1-dev/ae.safetensors"}


def build(cfg: Config, *, rngs: nnx.Rngs):
    return sd_vae.build(cfg, rngs=rngs)
