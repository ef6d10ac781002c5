"""The video VAE of Open-Sora 1.3 (259M): causal 3-D convolutions, 4 x 8 x 8 fewer positions, 16 channels.

1 + 4n frames become 1 + n latents. Long videos go through in micro clips, which may share a frame (temporal_overlap):
it is encoded twice and the two decoded versions are averaged. The reference's tiled convolutions are exact and save
memory only; XLA needs none.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.autoencoder import AttentionBlock, ResnetBlock, shared_attention
from opensora_jax.nn.conv import CausalConv3d, upsample_nearest
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.vaes.posterior import Posterior
from opensora_jax.vaes.video_vae_v13_statistics import STATISTICS


@dataclass(frozen=True)
class Half:
    """Encoder or decoder, level 0 being the finest."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    time_levels: tuple[int, ...] = ()  # where time is resampled as well as space


@dataclass(frozen=True)
class Config:
    in_channels: int = 3
    out_channels: int = 3
    z_channels: int = 16
    ch: int = 128  # of the encoder's first convolution
    encoder: Half = field(default_factory=lambda: Half(time_levels=(1, 2)))
    decoder: Half = field(default_factory=lambda: Half(time_levels=(2, 3)))
    temporal_downsample: int = 4  # the decoder drops one frame less than this
    resamp_with_conv: bool = True
    # As in the released configurations. Micro clips are used only when micro_batch_size says how many are in flight.
    micro_batch_size: int | None = 1
    micro_frame_size: int | None = 17
    temporal_overlap: bool = True
    normalization: str | None = "video"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for half in ("encoder", "decoder"):
            if isinstance(getattr(self, half), dict):  # as files hold it
                object.__setattr__(self, half, Half(**getattr(self, half)))
        if self.normalization is not None and self.normalization not in STATISTICS:
            raise UserError(f"normalization {self.normalization!r} is unknown; choose {', '.join(STATISTICS)} or None")

    @property
    def compression(self) -> tuple[int, int]:
        """Of time and of space."""
        return 2 ** len(self.encoder.time_levels), 2 ** (len(self.encoder.widths) - 1)

    @property
    def clip(self) -> int | None:
        return None if self.micro_batch_size is None else self.micro_frame_size


PRESETS = {"OpenSoraVAE_V1_3": Config()}
REPOSITORIES = {"OpenSoraVAE_V1_3": "hpcai-tech/OpenSora-VAE-v1.3"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "VideoVAE":
    return VideoVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    factor = cfg.compression[1]
    size = (pixel_frames(cfg, shape.frames), shape.height * factor, shape.width * factor)
    return {"x": jax.ShapeDtypeStruct((shape.batch, *size, cfg.in_channels), "float32")}


def latent_size(cfg: Config, frames, height, width, patch: tuple[int, int, int] | None = None) -> tuple:
    """Pixels (T, H, W) → latents; None stays None. Frames beyond the last whole micro clip do not count."""
    time, *space = patch or (cfg.compression[0], cfg.compression[1], cfg.compression[1])
    micro, overlap = cfg.micro_frame_size, int(cfg.temporal_overlap)
    if frames is None or frames == 1:
        count = frames
    elif micro is None:
        count = (frames - 1) // time + 1
    else:
        count = (frames - overlap) // (micro - overlap) * ((micro - 1) // time + 1)
    return (count, *(None if side is None else -(-side // p) for side, p in zip((height, width), space)))


def pixel_frames(cfg: Config, latents: int) -> int:
    """Frames that `decode` makes of so many latent frames."""
    frames = lambda count: cfg.compression[0] * count - (cfg.temporal_downsample - 1) if count else 0
    if cfg.clip is None:
        return frames(latents)
    size = _latents_of_clip(cfg)
    whole, rest = divmod(latents, size)
    clips = whole + (rest > 0)
    return whole * frames(size) + frames(rest) - (clips - 1) * cfg.temporal_overlap


def _latents_of_clip(cfg: Config) -> int:
    return -(-(cfg.clip or 1) // cfg.compression[0])


def normalise(cfg: Config, z):
    mean, std = _statistics(cfg, z.shape[1])
    return (z - mean) / std


def denormalise(cfg: Config, z):
    mean, std = _statistics(cfg, z.shape[1])
    return z * std + mean


def _statistics(cfg: Config, frames: int) -> Any:
    """Mean and deviation per channel [C], or per channel and place in the micro clip [T', 1, 1, C]."""
    if cfg.normalization is None:
        return 0.0, 1.0
    tables = [jnp.asarray(table, jnp.float32) for table in STATISTICS[cfg.normalization]]
    if cfg.normalization == "video":
        return tables
    places = len(tables[0])
    if frames != 1 and frames % places:
        raise UserError(f"normalization by {places} frames needs 1 or a multiple of {places} latents, not {frames}")
    return [jnp.tile(table[:frames], (max(frames // places, 1), 1))[:, None, None] for table in tables]


class VideoVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.encoder = Encoder(cfg, **kwargs)
        self.decoder = Decoder(cfg, **kwargs)

    def posterior(self, x) -> Posterior:
        """x [B, T, H, W, 3] in [-1, 1] → the posterior before normalisation."""
        x = x.astype(self.cfg.dtype)
        clip, overlap = self.cfg.clip, int(self.cfg.temporal_overlap)
        if clip is None or x.shape[1] == 1:
            return Posterior.of(self._few_at_once(self.encoder, x))
        step = clip - overlap
        whole = (x.shape[1] - overlap) // step
        parts = []
        if whole:
            windows = jnp.stack([x[:, i * step : i * step + clip] for i in range(whole)], 1)
            parts.append(_unfold(self._few_at_once(self.encoder, _fold(windows)), whole, joined=True))
        if (x.shape[1] - overlap) % step:
            parts.append(self._few_at_once(self.encoder, x[:, whole * step :]))
        return Posterior.of(jnp.concatenate(parts, 1))

    def encode(self, x, key=None, noise=None):
        """[B, T, H, W, 3] → normalised latents [B, T', h, w, z]; the posterior's mean unless a key or noise is given."""
        return normalise(self.cfg, self.posterior(x).sample(key, noise))

    def decode(self, z, num_frames=None):
        """[B, T', h, w, z] → [B, T, H, W, 3] float32, cut to num_frames when more come out."""
        return self._frames(denormalise(self.cfg, z))[:, :num_frames]

    def __call__(self, x, key=None):
        """Reconstruction and posterior, for training."""
        posterior = self.posterior(x)
        return self._frames(posterior.sample(key)), posterior

    def _frames(self, z):
        z = z.astype(self.cfg.dtype)
        size = z.shape[1] if self.cfg.clip is None else _latents_of_clip(self.cfg)
        whole, rest = divmod(z.shape[1], size)
        parts = []
        if whole:
            clips = z[:, : whole * size].reshape(-1, size, *z.shape[2:])
            decoded = _unfold(self._few_at_once(self.decoder, clips), whole, joined=False)
            parts += [decoded[:, i] for i in range(whole)]
        if rest:
            parts.append(self._few_at_once(self.decoder, z[:, whole * size :]))
        if self.cfg.temporal_overlap:
            for i in range(1, len(parts)):
                shared = 0.5 * (parts[i - 1][:, -1:] + parts[i][:, :1])
                parts[i - 1] = jnp.concatenate([parts[i - 1][:, :-1], shared], 1)
                parts[i] = parts[i][:, 1:]
        return jnp.concatenate(parts, 1).astype(jnp.float32)

    def _few_at_once(self, network, x):
        limit = self.cfg.micro_batch_size
        if limit is None or len(x) <= limit:
            return network(x)
        return jax.lax.map(lambda clip: network(clip[None])[0], x, batch_size=limit)


def _fold(clips):
    return clips.reshape(-1, *clips.shape[2:])


def _unfold(x, clips: int, *, joined: bool):
    """[B * clips, T, ...] → [B, clips * T, ...] or [B, clips, T, ...]."""
    return x.reshape(-1, clips * x.shape[1], *x.shape[2:]) if joined else x.reshape(-1, clips, *x.shape[1:])


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        half, last = cfg.encoder, len(cfg.encoder.widths) - 1

        def down(level, width):
            in_time = level in half.time_levels
            return Downsample(width, in_time, cfg.resamp_with_conv, **kwargs) if level < last else None

        self.conv_in = CausalConv3d(cfg.in_channels, cfg.ch, 3, **kwargs)
        self.levels = Layers(
            Level(before, width, half.num_res_blocks, down(n, width), **kwargs)
            for n, (before, width) in enumerate(zip((cfg.ch, *half.widths), half.widths))
        )
        self.mid = Middle(half.widths[-1], **kwargs)
        self.norm_out = GroupNorm(half.widths[-1], param_dtype=kwargs["param_dtype"])
        self.conv_out = CausalConv3d(half.widths[-1], 2 * cfg.z_channels, 3, **kwargs)

    def __call__(self, x):
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
            x = x if level.resample is None else level.resample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Levels are numbered as in the encoder and run from the last to the first."""

    def __init__(self, cfg: Config, **kwargs):
        half = cfg.decoder

        def up(level, width):
            if level == 0:
                return None
            in_time = level in half.time_levels
            return UpsampleTime(width, **kwargs) if in_time else UpsampleSpace(width, cfg.resamp_with_conv, **kwargs)

        self.extra_frames = cfg.temporal_downsample - 1
        self.conv_in = CausalConv3d(cfg.z_channels, half.widths[-1], 3, **kwargs)
        self.mid = Middle(half.widths[-1], **kwargs)
        self.levels = Layers(
            Level(before, width, half.num_res_blocks + 1, up(n, width), **kwargs)
            for n, (before, width) in enumerate(zip((*half.widths[1:], half.widths[-1]), half.widths))
        )
        self.norm_out = GroupNorm(half.widths[0], param_dtype=kwargs["param_dtype"])
        self.conv_out = CausalConv3d(half.widths[0], cfg.out_channels, 3, **kwargs)

    def __call__(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed([*self.levels]):
            x = level(x)
            x = x if level.resample is None else level.resample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))[:, self.extra_frames :]


class Level(nnx.Module):
    """The resnets of one resolution, and what leads to the next."""

    def __init__(self, inputs, outputs, depth, resample, **kwargs):
        resnet = resnet_of(kwargs)
        self.resnets = Layers(resnet(inputs if i == 0 else outputs, outputs) for i in range(depth))
        self.resample = resample

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Middle(nnx.Module):
    """Attention sees every token up to itself in (t, h, w) order: causal by token, not by frame."""

    def __init__(self, width, **kwargs):
        self.block_1 = resnet_of(kwargs)(width, width)
        self.attn_1 = AttentionBlock(width, **kwargs)
        self.block_2 = resnet_of(kwargs)(width, width)

    def __call__(self, x):
        return self.block_2(self.attn_1(self.block_1(x), partial(shared_attention, causal=True)))


class Downsample(nnx.Module):
    """Half the height and width, and for `in_time` half the frames, by a strided convolution or by means."""

    def __init__(self, width, in_time, with_conv, **kwargs):
        self.window = (2, 2, 2) if in_time else (1, 2, 2)
        self.causal = CausalConv3d(width, width, 3, strides=(2, 2, 2), **kwargs) if with_conv and in_time else None
        self.flat = (
            Conv(width, width, (3, 3), strides=2, padding=((0, 1), (0, 1)), **kwargs)
            if with_conv and not in_time
            else None
        )

    def __call__(self, x):
        conv = self.causal or self.flat
        return nnx.avg_pool(x, self.window, strides=self.window) if conv is None else conv(x)


class UpsampleTime(nnx.Module):
    """Nearest neighbours, twice in time and space, then a residual block; its input is added a second time."""

    def __init__(self, width, **kwargs):
        self.conv1, self.conv2 = (CausalConv3d(width, width, 3, **kwargs) for _ in range(2))
        self.norm1, self.norm2 = (GroupNorm(width, eps=1e-5, param_dtype=kwargs["param_dtype"]) for _ in range(2))

    def __call__(self, x):
        x = upsample_nearest(x, (2, 2, 2))
        h = self.norm2(self.conv2(jax.nn.silu(self.norm1(self.conv1(x)))))
        return jax.nn.silu(h + x) + x


class UpsampleSpace(nnx.Module):
    def __init__(self, width, with_conv, **kwargs):
        self.conv = Conv(width, width, (3, 3), padding=((1, 1), (1, 1)), **kwargs) if with_conv else None

    def __call__(self, x):
        x = upsample_nearest(x, (1, 2, 2))
        return x if self.conv is None else self.conv(x)


def resnet_of(kwargs):
    return partial(
        ResnetBlock, conv=lambda i, o, size: CausalConv3d(i, o, size, **kwargs), param_dtype=kwargs["param_dtype"]
    )
