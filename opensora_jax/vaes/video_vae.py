"""The video VAE of Open-Sora 1.2 (384M): an image VAE frame by frame, then a causal temporal VAE over its latents,
in micro clips of 17 frames (5 latents), then a shift and scale per channel. 4 x 8 x 8 fewer positions, 4 channels.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.activations import activation
from opensora_jax.nn.autoencoder import ResnetBlock
from opensora_jax.nn.conv import CausalConv3d
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.nn.params import Buffer
from opensora_jax.vaes import sd_vae
from opensora_jax.vaes.posterior import Posterior


@dataclass(frozen=True)
class Config:
    spatial: sd_vae.Config = field(default_factory=lambda: sd_vae.Config(micro_batch_size=4))
    in_out_channels: int = 4  # of the image latents
    latent_embed_dim: int = 4
    embed_dim: int = 4  # of the video latents
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32
    activation_fn: str = "swish"
    micro_frame_size: int | None = 17  # None: the whole clip at once
    micro_clip_batch: int | None = None  # micro clips in flight in the temporal VAE; None: all
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if isinstance(self.spatial, dict):  # as files hold it
            object.__setattr__(self, "spatial", sd_vae.Config(**self.spatial))

    @property
    def time_factor(self) -> int:
        return 2 ** sum(self.temporal_downsample)


PRESETS = {"OpenSoraVAE_V1_2": Config()}
REPOSITORIES = {"OpenSoraVAE_V1_2": "hpcai-tech/OpenSora-VAE-v1.2"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "VideoVAE":
    return VideoVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    frames = pixel_frames(shape.frames, cfg.micro_frame_size, cfg.time_factor)
    sides = (shape.height * cfg.spatial.downsampling, shape.width * cfg.spatial.downsampling)
    return {"x": jax.ShapeDtypeStruct((shape.batch, frames, *sides, cfg.spatial.in_channels), "float32")}


def latent_frames(frames: int, micro: int | None = 17, factor: int = 4) -> int:
    """17 → 5, 34 → 10, 20 → 6: every micro clip is rounded up by itself."""
    whole, rest = divmod(frames, micro) if micro else (0, frames)
    return whole * -(-(micro or 0) // factor) + -(-rest // factor)


def pixel_frames(latents: int, micro: int | None = 17, factor: int = 4) -> int:
    """The largest number of frames that gives so many latents."""
    whole, rest = divmod(latents, latent_frames(micro, None, factor)) if micro else (0, latents)
    return whole * (micro or 0) + rest * factor


def latent_size(cfg: Config, frames, height, width) -> tuple:
    """Pixels (T, H, W) → latents; None stays None."""
    time = None if frames is None else latent_frames(frames, cfg.micro_frame_size, cfg.time_factor)
    return (time, *sd_vae.latent_size(cfg.spatial, None, height, width)[1:])


class Reconstruction(NamedTuple):
    """What the losses of VAE training look at."""

    x_rec: jax.Array  # [B, T, H, W, 3]
    x_z_rec: jax.Array  # image latents as the temporal VAE gives them back, [B, T, h, w, c]
    x_z: jax.Array  # and as the image VAE made them
    posterior: Posterior  # of the video latents, before shift and scale
    z: jax.Array


class VideoVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.spatial = sd_vae.build(cfg.spatial, rngs=rngs)
        self.temporal = TemporalVAE(cfg, rngs=rngs)
        self.shift = Buffer(jnp.asarray(cfg.shift, cfg.param_dtype))
        self.scale = Buffer(jnp.asarray(cfg.scale, cfg.param_dtype))

    def encode(self, x, key=None, noise=None):
        """[B, T, H, W, 3] in [-1, 1] → [B, T', h, w, 4]; posterior means unless a key is given, or the noise of both
        VAEs (image latents, video latents)."""
        keys = (None, None) if key is None else jax.random.split(key)
        noises = noise or (None, None)
        x_z = self.encode_frames(x, keys[0], noises[0])
        return self.normalise(self.encode_time(x_z).sample(keys[1], noises[1]))

    def decode(self, z, num_frames=None):
        """[B, T', h, w, 4] → [B, num_frames, H, W, 3] float32; by default as many frames as the latents can hold."""
        return self.decode_frames(self.decode_time(self.denormalise(z), num_frames))

    def __call__(self, x, key=None) -> Reconstruction:
        """The whole way and back, for training; every posterior is sampled when a key is given."""
        keys = (None, None) if key is None else jax.random.split(key)
        x_z = self.encode_frames(x, keys[0])
        posterior = self.encode_time(x_z)
        z = posterior.sample(keys[1])
        x_z_rec = self.decode_time(z, x.shape[1])
        return Reconstruction(self.decode_frames(x_z_rec), x_z_rec, x_z, posterior, z)

    def encode_frames(self, x, key=None, noise=None):
        return self.spatial.encode(x, key, noise)

    def decode_frames(self, x_z):
        return self.spatial.decode(x_z)

    def normalise(self, z):
        return (z - self.shift[...]) / self.scale[...]

    def denormalise(self, z):
        return z * self.scale[...] + self.shift[...]

    def encode_time(self, x_z) -> Posterior:
        """Image latents [B, T, h, w, c] → the posterior of [B, T', h, w, c]."""
        size = self.cfg.micro_frame_size or x_z.shape[1]
        encode = self.temporal.encode
        return Posterior.of(self._by_clip(x_z, x_z.shape[1] // size, size, encode, encode))

    def decode_time(self, z, num_frames=None):
        """Video latents → image latents [B, num_frames, h, w, c] float32."""
        micro, factor = self.cfg.micro_frame_size, self.cfg.time_factor
        frames = pixel_frames(z.shape[1], micro, factor) if num_frames is None else num_frames
        if (wanted := latent_frames(frames, micro, factor)) != z.shape[1]:
            raise UserError(f"{frames} frames are {wanted} latent frames, but there are {z.shape[1]} to decode")
        clips, rest = divmod(frames, micro or frames)
        decode = lambda count: lambda clip: self.temporal.decode(clip, count)
        size = latent_frames(micro or frames, None, factor)
        return self._by_clip(z, clips, size, decode(micro or frames), decode(rest)).astype(jnp.float32)

    def _by_clip(self, x, clips: int, size: int, network, tail):
        """`network` on the first `clips` clips of `size` frames, as one batch; `tail` on what is left of the time."""
        x = x.astype(self.cfg.dtype)
        parts = []
        if clips:
            batch = x[:, : clips * size].reshape(-1, size, *x.shape[2:])
            limit = self.cfg.micro_clip_batch
            if limit is None or len(batch) <= limit:
                out = network(batch)
            else:
                out = jax.lax.map(lambda clip: network(clip[None])[0], batch, batch_size=limit)
            parts.append(out.reshape(x.shape[0], -1, *out.shape[2:]))
        if x.shape[1] > clips * size:
            parts.append(tail(x[:, clips * size :]))
        return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]


class TemporalVAE(nnx.Module):
    """One clip at a time; frames are padded with zeros in front to a multiple of the compression."""

    def __init__(self, cfg: Config, *, rngs):
        self.factor = cfg.time_factor
        conv = partial(CausalConv3d, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.encoder = Encoder(cfg, conv)
        self.decoder = Decoder(cfg, conv)
        self.quant_conv = conv(2 * cfg.latent_embed_dim, 2 * cfg.embed_dim, 1)
        self.post_quant_conv = conv(cfg.embed_dim, cfg.latent_embed_dim, 1)

    def encode(self, x):
        """[B, T, h, w, c] → moments [B, T', h, w, 2c]."""
        x = jnp.pad(x, [(0, 0), (-x.shape[1] % self.factor, 0), (0, 0), (0, 0), (0, 0)])
        return self.quant_conv(self.encoder(x))

    def decode(self, z, frames: int):
        return self.decoder(self.post_quant_conv(z))[:, -frames % self.factor :]


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, conv):
        resnet = resnet_of(cfg, conv)
        widths = [cfg.filters * multiplier for multiplier in cfg.channel_multipliers]
        self.act = activation(cfg.activation_fn)
        self.conv_in = conv(cfg.in_out_channels, cfg.filters, 3, bias=False)
        self.stages = Layers(
            Layers(resnet(before if i == 0 else width, width) for i in range(cfg.num_res_blocks))
            for before, width in zip((cfg.filters, *widths), widths)
        )
        # Half of the causal padding: (kernel - 1) + (1 - stride) frames in front of a strided convolution.
        self.down = Layers(
            conv(width, width, 3, strides=(2, 1, 1), front=1) if halve else None
            for width, halve in zip(widths, cfg.temporal_downsample)
        )
        self.resnets = Layers(resnet(widths[-1], widths[-1]) for _ in range(cfg.num_res_blocks))
        self.norm_out = GroupNorm(widths[-1], groups=cfg.num_groups, eps=1e-5, param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[-1], 2 * cfg.latent_embed_dim, 1)

    def __call__(self, x):
        x = self.conv_in(x)
        for stage, down in zip(self.stages, [*self.down, None]):
            for resnet in stage:
                x = resnet(x)
            x = x if down is None else down(x)
        for resnet in self.resnets:
            x = resnet(x)
        return self.conv_out(self.act(self.norm_out(x)))


class Decoder(nnx.Module):
    """Stages and `up` are numbered as in the encoder and run from the last to the first."""

    def __init__(self, cfg: Config, conv):
        resnet = resnet_of(cfg, conv)
        widths = [cfg.filters * multiplier for multiplier in cfg.channel_multipliers]
        self.act = activation(cfg.activation_fn)
        self.conv_in = conv(cfg.latent_embed_dim, widths[-1], 3)
        self.resnets = Layers(resnet(widths[-1], widths[-1]) for _ in range(cfg.num_res_blocks))
        self.stages = Layers(
            Layers(resnet(before if i == 0 else width, width) for i in range(cfg.num_res_blocks))
            for before, width in zip((*widths[1:], widths[-1]), widths)
        )
        self.up = Layers(
            conv(width, 2 * width, 3) if double else None for width, double in zip(widths[1:], cfg.temporal_downsample)
        )
        self.norm_out = GroupNorm(widths[0], groups=cfg.num_groups, eps=1e-5, param_dtype=cfg.param_dtype)
        self.conv_out = conv(widths[0], cfg.in_out_channels, 3)

    def __call__(self, z):
        x = self.conv_in(z)
        for resnet in self.resnets:
            x = resnet(x)
        for stage, up in zip(reversed([*self.stages]), [*reversed([*self.up]), None]):
            for resnet in stage:
                x = resnet(x)
            x = x if up is None else _channels_to_frames(up(x))
        return self.conv_out(self.act(self.norm_out(x)))


def resnet_of(cfg: Config, conv):
    kwargs = dict(groups=cfg.num_groups, eps=1e-5, act=activation(cfg.activation_fn), param_dtype=cfg.param_dtype)
    return partial(ResnetBlock, conv=partial(conv, bias=False), **kwargs)


def _channels_to_frames(x):
    """[B, T, h, w, 2c] → [B, 2T, h, w, c]; the two frames run fastest within a channel."""
    b, t, h, w, c = x.shape
    return x.reshape(b, t, h, w, c // 2, 2).transpose(0, 1, 5, 2, 3, 4).reshape(b, 2 * t, h, w, c // 2)
