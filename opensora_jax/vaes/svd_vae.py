"""The autoencoder of Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127; diffusers'
AutoencoderKLTemporalDecoder): Stable Diffusion's image encoder, and a decoder that also looks along time.

Open-Sora offers it as a decoder for the latents of its image VAE: the frames flicker less.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.autoencoder import AttentionBlock, ResnetBlock
from opensora_jax.nn.conv import upsample_nearest
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.vaes import sd_vae
from opensora_jax.vaes.posterior import Posterior


@dataclass(frozen=True)
class Config:
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    micro_batch_size: int | None = None  # frames decoded together; time is then blind across the pieces
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def image(self) -> sd_vae.Config:
        """The image VAE whose encoder this is."""
        shared = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels")
        return sd_vae.Config(**{key: getattr(self, key) for key in (*shared, "dtype", "param_dtype")})


PRESETS = {"svd-vae": Config()}
REPOSITORIES = {"svd-vae": "stabilityai/stable-video-diffusion-img2vid/vae"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "SVDVAE":
    return SVDVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    return sd_vae.inputs(cfg.image, shape)


class SVDVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        conv = sd_vae.same_conv(cfg.image, rngs)
        self.encoder = sd_vae.Encoder(cfg.image, conv, rngs=rngs)
        self.quant_conv = conv(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.decoder = TemporalDecoder(cfg, conv, rngs=rngs)

    def posterior(self, x) -> Posterior:
        frames = x.astype(self.cfg.dtype).reshape(-1, *x.shape[-3:])
        moments = self.quant_conv(self.encoder(frames))
        return Posterior.of(moments.reshape(*x.shape[:-3], *moments.shape[1:]))

    def encode(self, x, key=None, noise=None):
        """[B, T, H, W, 3] → latents [B, T, h, w, z]; the posterior's mean unless a key or noise is given."""
        return self.posterior(x).sample(key, noise) * self.cfg.scaling_factor

    def decode(self, z, num_frames=None):
        """[B, T, h, w, z] → [B, T, H, W, 3] float32; num_frames may only repeat T, as for every VAE."""
        if num_frames not in (None, z.shape[1]):
            raise ValueError(f"an image VAE decodes a frame a latent: {z.shape[1]} latents, num_frames {num_frames}")
        z = (z / self.cfg.scaling_factor).astype(self.cfg.dtype)
        size = self.cfg.micro_batch_size or z.shape[1]
        pieces = [self.decoder(z[:, i : i + size]) for i in range(0, z.shape[1], size)]
        return jnp.concatenate(pieces, 1).astype(jnp.float32)

    def __call__(self, x, key=None):
        """Reconstruction and posterior, for training."""
        posterior = self.posterior(x)
        return self.decode(posterior.sample(key) * self.cfg.scaling_factor), posterior


class TemporalDecoder(nnx.Module):
    def __init__(self, cfg: Config, conv, *, rngs):
        widths = cfg.block_out_channels[::-1]
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)

        def in_time(inputs, outputs, size):  # 1-wide in space
            return Conv(inputs, outputs, (size, 1, 1), padding=((size // 2, size // 2), (0, 0), (0, 0)), **kwargs)

        block = lambda inputs, outputs: SpaceTimeBlock(inputs, outputs, conv, in_time, cfg.param_dtype)
        self.conv_in = conv(cfg.latent_channels, widths[0], 3)
        self.mid = Layers(block(widths[0], widths[0]) for _ in range(cfg.layers_per_block))
        self.attention = AttentionBlock(widths[0], **kwargs)
        self.stages = Layers(
            sd_vae.Stage(
                [block(before if i == 0 else width, width) for i in range(cfg.layers_per_block + 1)],
                conv(width, width, 3) if n < len(widths) - 1 else None,
            )
            for n, (before, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.norm_out = GroupNorm(widths[-1], param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[-1], cfg.out_channels, 3)
        self.time_conv_out = in_time(cfg.out_channels, cfg.out_channels, 3)

    def __call__(self, z):
        """[B, T, h, w, z] → [B, T, H, W, 3]; time is looked at by the blocks, everything else is per frame."""
        x = self.mid[0](self.conv_in(z))
        if len(self.mid) > 1:  # any beyond the second are in the checkpoint, but never run
            x = self.mid[1](per_frame(self.attention, x))
        for stage in self.stages:
            x = stage(x)
            x = x if stage.resample is None else stage.resample(upsample_nearest(x, (1, 2, 2)))
        x = self.conv_out(jax.nn.silu(per_frame(self.norm_out, x)))
        return self.time_conv_out(x)


class SpaceTimeBlock(nnx.Module):
    """A resnet on each frame, one along time, and a learned balance of the two."""

    def __init__(self, inputs, outputs, conv, in_time, param_dtype):
        self.space = ResnetBlock(inputs, outputs, conv, param_dtype=param_dtype)
        self.time = ResnetBlock(outputs, outputs, in_time, eps=1e-5, param_dtype=param_dtype)
        self.mix = nnx.Param(jnp.zeros(1, param_dtype))

    def __call__(self, x):
        still = per_frame(self.space, x)
        moving = self.time(still)
        share = jax.nn.sigmoid(self.mix[...].astype(x.dtype))
        return share * moving + (1 - share) * still


def per_frame(network, x):
    """Frames as a batch: their statistics do not mix."""
    out = network(x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])
