"""HunyuanVideo's causal video autoencoder (arXiv 2412.03603, section 4.1), the VAE of Open-Sora 2.0: 4 x 8 x 8 fewer
positions, 16 channels; 4k + 1 frames become k + 1.

Latents are (posterior - shift_factor) * scale_factor. Long or large clips go through in tiles that are cross-faded;
the tiles of time have one frame more than their size, which all but the first give away.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn import taps
from opensora_jax.nn.activations import activation
from opensora_jax.nn.autoencoder import AttentionBlock, ResnetBlock, frame_causal_attention
from opensora_jax.nn.conv import CausalConv3d, upsample_nearest
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.vaes import tiling
from opensora_jax.vaes.posterior import Posterior, Reconstruction


@dataclass(frozen=True)
class Config:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    time_compression_ratio: int = 4
    spatial_compression_ratio: int = 8
    scale_factor: float = 0.476986
    shift_factor: float = 0.0
    use_slicing: bool = False  # one sample at a time
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    sample_size: int = 256  # side of a tile in pixels
    sample_tsize: int = 64  # length of a tile in frames
    tile_overlap_factor: float = 0.25
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.time_compression_ratio not in (4, 8):
            raise UserError(f"hunyuan_vae: time_compression_ratio={self.time_compression_ratio}; choose 4 or 8")

    @property
    def factors(self) -> tuple[tuple[int, int, int], ...]:
        """(T, H, W) by which each stage but none-at-all changes the size: down in the encoder, up in the decoder.
        Space is halved first and time last; with a ratio of 8 time is halved together with space."""
        last = len(self.block_out_channels) - 1
        spatial, temporal = (r.bit_length() - 1 for r in (self.spatial_compression_ratio, self.time_compression_ratio))
        in_space = [i < spatial for i in range(last + 1)]
        in_time = [last - temporal <= i < last for i in range(last + 1)] if temporal == 2 else in_space
        return tuple((1 + t, 1 + s, 1 + s) for t, s in zip(in_time, in_space))


PRESETS = {
    "hunyuan_vae": Config(use_spatial_tiling=True),  # as Open-Sora 2.0 samples and trains
    "hunyuan_vae_reconstruction": Config(use_spatial_tiling=True, use_temporal_tiling=True),
    "hunyuan_vae_untiled": Config(),
}
REPOSITORIES = dict.fromkeys(PRESETS, "hpcai-tech/Open-Sora-v2/hunyuan_vae.safetensors")


def build(cfg: Config, *, rngs: nnx.Rngs) -> "HunyuanVAE":
    return HunyuanVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    sides = (shape.height * cfg.spatial_compression_ratio, shape.width * cfg.spatial_compression_ratio)
    frames = pixel_frames(cfg, shape.frames)
    return {"x": jax.ShapeDtypeStruct((shape.batch, frames, *sides, cfg.in_channels), "float32")}


def latent_size(cfg: Config, frames, height, width) -> tuple:
    """Pixels (T, H, W) → latents, rounded up; None stays None."""
    ratios = (cfg.time_compression_ratio, cfg.spatial_compression_ratio, cfg.spatial_compression_ratio)
    return tuple(None if n is None else (n - 1) // ratio + 1 for n, ratio in zip((frames, height, width), ratios))


def pixel_frames(cfg: Config, latents: int) -> int:
    return (latents - 1) * cfg.time_compression_ratio + 1


class HunyuanVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.encoder = Encoder(cfg, **kwargs)
        self.decoder = Decoder(cfg, **kwargs)
        self.quant_conv = Linear(2 * cfg.latent_channels, 2 * cfg.latent_channels, **kwargs)
        self.post_quant_conv = Linear(cfg.latent_channels, cfg.latent_channels, **kwargs)

    def posterior(self, x) -> Posterior:
        """x [B, T, H, W, C] in [-1, 1]; unscaled. Tiles are faded before means and variances are read."""
        return Posterior.of(self._run(lambda x: self.quant_conv(self.encoder(x)), x, *self._tiles(encoding=True)))

    def encode(self, x, key=None, noise=None):
        """[B, T, H, W, 3] → latents [B, T', h, w, z]; the posterior's mean unless a key or noise is given."""
        return (self.posterior(x).sample(key, noise) - self.cfg.shift_factor) * self.cfg.scale_factor

    def decode(self, z, num_frames=None):
        """Latents [B, T', h, w, z] → [B, num_frames, H, W, 3] float32; by default, and at most, those that they hold."""
        if num_frames is not None and latent_size(self.cfg, num_frames, None, None)[0] > z.shape[1]:
            raise UserError(
                f"hunyuan_vae: {z.shape[1]} latent frames hold {pixel_frames(self.cfg, z.shape[1])} frames, not {num_frames}"
            )
        z = z / self.cfg.scale_factor + self.cfg.shift_factor
        out = self._run(lambda z: self.decoder(self.post_quant_conv(z)), z, *self._tiles(encoding=False))
        return out[:, :num_frames].astype(jnp.float32)

    def __call__(self, x, key=None):
        """Reconstruction and posterior, for training."""
        posterior = self.posterior(x)
        latents = (posterior.sample(key) - self.cfg.shift_factor) * self.cfg.scale_factor
        return Reconstruction(self.decode(latents), posterior)

    def _tiles(self, *, encoding: bool) -> tuple[tiling.Tiles | None, tiling.Tiles | None]:
        """Of time and of space, where they are in use."""
        cfg = self.cfg
        space = (cfg.sample_size, cfg.sample_size // 2 ** (len(cfg.block_out_channels) - 1))
        time = (cfg.sample_tsize, cfg.sample_tsize // cfg.time_compression_ratio)
        cut = lambda pair, lead: tiling.Tiles.of(
            *pair[:: 1 if encoding else -1], overlap=cfg.tile_overlap_factor, lead=lead
        )
        return cut(time, 1) if cfg.use_temporal_tiling else None, cut(space, 0) if cfg.use_spatial_tiling else None

    def _run(self, network, x, time: tiling.Tiles | None, space: tiling.Tiles | None):
        run = partial(tiling.run, network, time=time, space=space)
        x = x.astype(self.cfg.dtype)
        return jax.lax.map(lambda sample: run(sample[None])[0], x) if self.cfg.use_slicing and len(x) > 1 else run(x)


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        widths = cfg.block_out_channels
        conv = causal_conv(**kwargs)
        resnet = resnet_of(cfg, conv)
        self.conv_in = conv(cfg.in_channels, widths[0], 3)
        self.stages = Layers(
            Stage(
                [resnet(before if i == 0 else width, width) for i in range(cfg.layers_per_block)],
                conv(width, width, 3, strides=factors) if max(factors) > 1 else None,
            )
            for before, width, factors in zip((widths[0], *widths), widths, cfg.factors)
        )
        self.mid = MidBlock(cfg, widths[-1], resnet, **kwargs)
        self.norm_out = GroupNorm(widths[-1], groups=cfg.norm_num_groups, param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[-1], 2 * cfg.latent_channels, 3)

    def __call__(self, x):
        with taps.scope("encoder."):
            x = taps.tap("conv_in", self.conv_in(x))
            for i, stage in enumerate(self.stages):
                x = stage(x)
                x = taps.tap(f"down_blocks.{i}", x if stage.resample is None else stage.resample(x))
            x = taps.tap("mid_block", self.mid(x))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        widths = cfg.block_out_channels[::-1]
        conv = causal_conv(**kwargs)
        resnet = resnet_of(cfg, conv)
        self.factors = cfg.factors
        self.conv_in = conv(cfg.latent_channels, widths[0], 3)
        self.mid = MidBlock(cfg, widths[0], resnet, **kwargs)
        self.stages = Layers(
            Stage(
                [resnet(before if i == 0 else width, width) for i in range(cfg.layers_per_block + 1)],
                conv(width, width, 3) if max(factors) > 1 else None,
            )
            for before, width, factors in zip((widths[0], *widths), widths, cfg.factors)
        )
        self.norm_out = GroupNorm(widths[-1], groups=cfg.norm_num_groups, param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[-1], cfg.out_channels, 3)

    def __call__(self, z):
        with taps.scope("decoder."):
            x = taps.tap("mid_block", self.mid(taps.tap("conv_in", self.conv_in(z))))
            for i, (stage, factors) in enumerate(zip(self.stages, self.factors)):
                x = stage(x)
                if stage.resample is not None:
                    x = stage.resample(upsample_causal(x, factors))
                x = taps.tap(f"up_blocks.{i}", x)
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
    def __init__(self, cfg: Config, width: int, resnet, **kwargs):
        self.resnets = Layers(resnet(width, width) for _ in range(2))
        attention = cfg.mid_block_add_attention
        self.attention = AttentionBlock(width, groups=cfg.norm_num_groups, **kwargs) if attention else None

    def __call__(self, x):
        x = self.resnets[0](x)
        if self.attention is not None:
            x = self.attention(x, partial(frame_causal_attention, frames=x.shape[1]))
        return self.resnets[1](x)


def upsample_causal(x, factors):
    """The first frame stays one frame: it has no others to be in the middle of."""
    first = upsample_nearest(x[:, :1], (1, *factors[1:]))
    return jnp.concatenate([first, upsample_nearest(x[:, 1:], factors)], 1)


def causal_conv(**kwargs):
    """conv(inputs, outputs, kernel size): causal in time; what lies outside repeats the border."""
    return partial(CausalConv3d, time_mode="edge", space_mode="edge", **kwargs)


def resnet_of(cfg: Config, conv):
    act = activation(cfg.act_fn)
    return partial(ResnetBlock, conv=conv, groups=cfg.norm_num_groups, act=act, param_dtype=cfg.param_dtype)
