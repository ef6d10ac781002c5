"""The image autoencoder of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752; diffusers' AutoencoderKL), frame by
frame: the VAE of Open-Sora 1.0 and 1.1 and of the DiT, Latte and PixArt families, and the spatial half of 1.2's.

Latents are (posterior - shift_factor) * scaling_factor.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.activations import activation
from opensora_jax.nn.autoencoder import AttentionBlock, ResnetBlock
from opensora_jax.nn.conv import upsample_nearest
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.vaes.posterior import Posterior, Reconstruction


@dataclass(frozen=True)
class Config:
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    micro_batch_size: int | None = None  # frames in flight; the others wait, and memory stays bounded
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


PRESETS = {
    "sd-vae-ft-ema": Config(),
    "sd-vae-ft-mse": Config(),
    "sdxl-vae": Config(scaling_factor=0.13025),
}
REPOSITORIES = {
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sdxl-vae": "stabilityai/sdxl-vae/diffusion_pytorch_model.safetensors",
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "SDVAE":
    return SDVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    size = (shape.batch, shape.frames, shape.height * cfg.downsampling, shape.width * cfg.downsampling)
    return {"x": jax.ShapeDtypeStruct((*size, cfg.in_channels), "float32")}


def latent_size(cfg: Config, frames, height, width) -> tuple:
    """Pixels (T, H, W) → latents; sides that do not divide are cut, None stays None."""
    return (frames, *(None if side is None else side // cfg.downsampling for side in (height, width)))


class SDVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        conv = same_conv(cfg, rngs)
        self.encoder = Encoder(cfg, conv, rngs=rngs)
        self.decoder = Decoder(cfg, conv, rngs=rngs)
        moments = 2 * cfg.latent_channels
        self.quant_conv = conv(moments, moments, 1) if cfg.use_quant_conv else None
        self.post_quant_conv = conv(cfg.latent_channels, cfg.latent_channels, 1) if cfg.use_post_quant_conv else None

    def posterior(self, x) -> Posterior:
        """x [B, T, H, W, C] in [-1, 1], or images [B, H, W, C]; unscaled."""
        return Posterior.of(self._by_frame(self._moments, x.astype(self.cfg.dtype)))

    def encode(self, x, key=None, noise=None):
        """[B, T, H, W, 3] → latents [B, T, h, w, z]; the posterior's mean unless a key or noise is given."""
        return (self.posterior(x).sample(key, noise) - self.cfg.shift_factor) * self.cfg.scaling_factor

    def decode(self, z, num_frames=None):
        """Latents [B, T, h, w, z] → [B, T, H, W, 3] float32; num_frames may only repeat T, as for every VAE."""
        if num_frames not in (None, z.shape[1]):
            raise ValueError(f"an image VAE decodes a frame a latent: {z.shape[1]} latents, num_frames {num_frames}")
        z = z / self.cfg.scaling_factor + self.cfg.shift_factor
        return self._by_frame(self._pixels, z.astype(self.cfg.dtype)).astype(jnp.float32)

    def __call__(self, x, key=None):
        """Reconstruction and posterior, for training."""
        posterior = self.posterior(x)
        pixels = self._by_frame(self._pixels, posterior.sample(key).astype(self.cfg.dtype))
        return Reconstruction(pixels.astype(jnp.float32), posterior)

    def _moments(self, x):
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def _pixels(self, z):
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _by_frame(self, network, x):
        frames = x.reshape(-1, *x.shape[-3:])
        size = self.cfg.micro_batch_size
        if size is None or len(frames) <= size:
            out = network(frames)
        else:
            out = jax.lax.map(lambda frame: network(frame[None])[0], frames, batch_size=size)
        return out.reshape(*x.shape[:-3], *out.shape[1:])


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, conv, *, rngs):
        widths = cfg.block_out_channels
        resnet = resnet_of(cfg, conv)
        self.conv_in = conv(cfg.in_channels, widths[0], 3)
        self.stages = Layers(
            Stage(
                [resnet(before if i == 0 else width, width) for i in range(cfg.layers_per_block)],
                # Stable Diffusion pads right and below only
                conv(width, width, 3, strides=2, padding=((0, 1), (0, 1))) if n < len(widths) - 1 else None,
            )
            for n, (before, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid = MidBlock(cfg, resnet, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=cfg.norm_num_groups, param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[-1], 2 * cfg.latent_channels, 3)

    def __call__(self, x):
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
            x = x if stage.resample is None else stage.resample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    def __init__(self, cfg: Config, conv, *, rngs):
        widths = cfg.block_out_channels[::-1]
        resnet = resnet_of(cfg, conv)
        self.conv_in = conv(cfg.latent_channels, widths[0], 3)
        self.mid = MidBlock(cfg, resnet, rngs=rngs)
        self.stages = Layers(
            Stage(
                [resnet(before if i == 0 else width, width) for i in range(cfg.layers_per_block + 1)],
                conv(width, width, 3) if n < len(widths) - 1 else None,
            )
            for n, (before, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.norm_out = GroupNorm(widths[-1], groups=cfg.norm_num_groups, param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[-1], cfg.out_channels, 3)

    def __call__(self, z):
        x = self.mid(self.conv_in(z))
        for stage in self.stages:
            x = stage(x)
            x = x if stage.resample is None else stage.resample(upsample_nearest(x, (2, 2)))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Stage(nnx.Module):
    """The resnets of one resolution, and the convolution that leads to the next."""

    def __init__(self, resnets, resample):
        self.resnets = Layers(resnets)
        self.resample = resample

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x


class MidBlock(nnx.Module):
    def __init__(self, cfg: Config, resnet, *, rngs):
        width = cfg.block_out_channels[-1]
        kwargs = dict(groups=cfg.norm_num_groups, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.resnets = Layers(resnet(width, width) for _ in range(2))
        self.attention = AttentionBlock(width, **kwargs) if cfg.mid_block_attention else None

    def __call__(self, x):
        x = self.resnets[0](x)
        x = x if self.attention is None else self.attention(x)
        return self.resnets[1](x)


def same_conv(cfg: Config, rngs):
    """conv(inputs, outputs, kernel size): a 2-D convolution, by default one that keeps the size."""

    def conv(inputs, outputs, size, *, strides=1, padding=None):
        padding = padding or ((size // 2, size // 2),) * 2
        return Conv(
            inputs, outputs, (size, size), strides=strides, padding=padding,
            dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs,
        )  # fmt: skip

    return conv


def resnet_of(cfg: Config, conv):
    act = activation(cfg.act_fn)
    return partial(ResnetBlock, conv=conv, groups=cfg.norm_num_groups, act=act, param_dtype=cfg.param_dtype)
