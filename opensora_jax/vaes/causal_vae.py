"""CausalVAE 4x8x8 of Open-Sora-Plan 1.0: Stable Diffusion's autoencoder made causal in time (a frame sees itself and
earlier ones; the first stands alone, so images are one-frame videos). 1 + 4k frames become 1 + k latents.

The parts are chosen by name, as in the released config.json. Attention of the released weights reads a [C, T] buffer as
[T, C] and so mixes channels with frames ("AttnBlock3D"); "AttnBlock3DFix" is what was meant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.attention import attention
from opensora_jax.nn.autoencoder import ResnetBlock
from opensora_jax.nn.conv import CausalConv3d, upsample_nearest
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.norms import GroupNorm
from opensora_jax.nn.taps import tap
from opensora_jax.vaes.posterior import Posterior, Reconstruction
from opensora_jax.vaes.tiling import Tiles, over_space

RESNETS_3D = ("ResnetBlock3D",) * 4


@dataclass(frozen=True)
class Config:
    hidden_size: int = 128
    z_channels: int = 4
    embed_dim: int = 4
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # one more in the decoder
    resolution: int = 256  # of training; only tells where attn_resolutions lie
    attn_resolutions: tuple[int, ...] = ()
    q_conv: str = "CausalConv3d"
    encoder_conv_in: str = "CausalConv3d"
    encoder_conv_out: str = "CausalConv3d"
    encoder_attention: str = "AttnBlock3D"
    encoder_resnet_blocks: tuple[str, ...] = RESNETS_3D
    encoder_spatial_downsample: tuple[str, ...] = ("SpatialDownsample2x",) * 3 + ("",)
    encoder_temporal_downsample: tuple[str, ...] = ("", "TimeDownsample2x", "TimeDownsample2x", "")
    encoder_mid_resnet: str = "ResnetBlock3D"
    decoder_conv_in: str = "CausalConv3d"
    decoder_conv_out: str = "CausalConv3d"
    decoder_attention: str = "AttnBlock3D"
    decoder_resnet_blocks: tuple[str, ...] = RESNETS_3D
    decoder_spatial_upsample: tuple[str, ...] = ("",) + ("SpatialUpsample2x",) * 3  # by level; the last runs first
    decoder_temporal_upsample: tuple[str, ...] = ("", "", "TimeUpsample2x", "TimeUpsample2x")
    decoder_mid_resnet: str = "ResnetBlock3D"
    scaling_factor: float = 0.18215
    tiling: bool = False  # images above the tile size go through in tiles
    tile_sample_min_size: int = 256
    tile_latent_min_size: int | None = None  # by default the latent of a tile
    tile_overlap_factor: float = 0.25
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        levels = len(self.hidden_size_mult)
        for name in ("resnet_blocks", "spatial_downsample", "temporal_downsample"):
            for side, part in (("encoder", name), ("decoder", name.replace("down", "up"))):
                found = getattr(self, f"{side}_{part}")
                if len(found) != levels:
                    raise ValueError(f"causal_vae: {side}_{part} names {len(found)} parts for {levels} levels")

    @property
    def tile_latent(self) -> int:
        return self.tile_latent_min_size or self.tile_sample_min_size // 2 ** (len(self.hidden_size_mult) - 1)


PRESETS = {
    "CausalVAE-4x8x8": Config(encoder_temporal_downsample=("TimeDownsample2x", "TimeDownsample2x", "", "")),
    "CausalVAE-4x8x8-late": Config(),  # the class's own defaults: time is halved one level later
}
REPOSITORIES = {"CausalVAE-4x8x8": "LanguageBind/Open-Sora-Plan-v1.0.0/vae"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "CausalVAE":
    return CausalVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    time = 2 ** sum(map(bool, cfg.encoder_temporal_downsample))
    space = 2 ** sum(map(bool, cfg.encoder_spatial_downsample))
    sizes = (shape.batch, 1 + time * (shape.frames - 1), shape.height * space, shape.width * space, 3)
    return {"x": jax.ShapeDtypeStruct(sizes, "float32")}


def latent_size(cfg: Config, frames, height, width) -> tuple:
    """[T, H, W] of pixels → of latents; None stays None."""
    for part in cfg.encoder_temporal_downsample:
        frames = (frames + 1) // 2 if part and frames is not None else frames
    space = 2 ** sum(map(bool, cfg.encoder_spatial_downsample))
    return (frames, *(None if side is None else side // space for side in (height, width)))


class CausalVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        make = Make(cfg, rngs)
        self.encoder = Encoder(cfg, make)
        self.decoder = Decoder(cfg, make)
        conv = make.conv(cfg.q_conv)
        self.quant_conv = conv(2 * cfg.z_channels, 2 * cfg.embed_dim, 1)
        self.post_quant_conv = conv(cfg.embed_dim, cfg.z_channels, 1)

    def posterior(self, x) -> Posterior:
        """x [B, T, H, W, 3] in [-1, 1]; unscaled."""
        cfg, x = self.cfg, x.astype(self.cfg.dtype)
        tiles = Tiles.of(cfg.tile_sample_min_size, cfg.tile_latent, overlap=cfg.tile_overlap_factor)
        if cfg.tiling and tiles.cut(*x.shape[2:4]):
            return Posterior.of(over_space(self._moments, x, tiles))
        return Posterior.of(self._moments(x))

    def encode(self, x, key=None, noise=None):
        """[B, T, H, W, 3] → latents [B, t, h, w, z]; the posterior's mean unless a key or noise is given."""
        return self.posterior(x).sample(key, noise) * self.cfg.scaling_factor

    def decode(self, z, num_frames=None):
        """Latents → [B, T, H, W, 3] float32, cut to num_frames."""
        return self.pixels(z / self.cfg.scaling_factor)[:, :num_frames]

    def pixels(self, z):
        """From unscaled latents."""
        cfg, z = self.cfg, z.astype(self.cfg.dtype)
        tiles = Tiles.of(cfg.tile_latent, cfg.tile_sample_min_size, overlap=cfg.tile_overlap_factor)
        if cfg.tiling and tiles.cut(*z.shape[2:4]):
            return over_space(self._pixels, z, tiles).astype(jnp.float32)
        return self._pixels(z).astype(jnp.float32)

    def __call__(self, x, key=None):
        """Reconstruction and posterior, for training."""
        posterior = self.posterior(x)
        return Reconstruction(self.pixels(posterior.sample(key)), posterior)

    def _moments(self, x):
        return self.quant_conv(self.encoder(x))

    def _pixels(self, z):
        return self.decoder(self.post_quant_conv(z))


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, make: "Make"):
        widths = [cfg.hidden_size * mult for mult in (1, *cfg.hidden_size_mult)]
        attend = make.attention(cfg.encoder_attention)
        self.conv_in = make.conv(cfg.encoder_conv_in)(3, cfg.hidden_size, 3)
        levels, size = [], cfg.resolution
        for i, (before, width) in enumerate(pairwise(widths)):
            level = Level(cfg.num_res_blocks, before, width, make.resnet(cfg.encoder_resnet_blocks[i]))
            level.attn = Layers(attend(width) for _ in level.block if size in cfg.attn_resolutions)
            level.downsample = make.resample(cfg.encoder_spatial_downsample[i], width)
            level.time_downsample = make.resample(cfg.encoder_temporal_downsample[i], width)
            size //= 2 if cfg.encoder_spatial_downsample[i] else 1
            levels.append(level)
        self.down = Layers(levels)
        self.mid = Mid(widths[-1], make.resnet(cfg.encoder_mid_resnet), attend)
        self.norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(cfg.encoder_conv_out)(widths[-1], 2 * cfg.z_channels, 3)

    def __call__(self, x):
        x = h = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = h = level(x)
            x = x if level.downsample is None else level.downsample(x)
            if level.time_downsample is not None:
                x = tap(f"encoder.down.{i}.time_downsample", level.time_downsample(x))
        h = self.mid(h, "encoder")  # as trained: what the last level would have resampled is left as it was
        return self.conv_out(jax.nn.silu(self.norm_out(h)))


class Decoder(nnx.Module):
    def __init__(self, cfg: Config, make: "Make"):
        top = len(cfg.hidden_size_mult) - 1
        width = cfg.hidden_size * cfg.hidden_size_mult[top]
        attend = make.attention(cfg.decoder_attention)
        self.conv_in = make.conv(cfg.decoder_conv_in)(cfg.z_channels, width, 3)
        self.mid = Mid(width, make.resnet(cfg.decoder_mid_resnet), attend)
        levels, size = [], cfg.resolution // 2**top
        for i in range(top, -1, -1):
            before, width = width, cfg.hidden_size * cfg.hidden_size_mult[i]
            level = Level(cfg.num_res_blocks + 1, before, width, make.resnet(cfg.decoder_resnet_blocks[i]))
            level.attn = Layers(attend(width) for _ in level.block if size in cfg.attn_resolutions)
            level.upsample = make.resample(cfg.decoder_spatial_upsample[i], width)
            level.time_upsample = make.resample(cfg.decoder_temporal_upsample[i], width)
            size *= 2 if cfg.decoder_spatial_upsample[i] else 1
            levels.append(level)
        self.up = Layers(reversed(levels))
        self.norm_out = make.norm(width)
        self.conv_out = make.conv(cfg.decoder_conv_out)(width, 3, 3)

    def __call__(self, z):
        x = self.mid(self.conv_in(z), "decoder")
        for i in reversed(range(len(self.up))):
            level = self.up[i]
            x = level(x, f"decoder.up.{i}.block")
            x = x if level.upsample is None else level.upsample(x)
            x = x if level.time_upsample is None else level.time_upsample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Level(nnx.Module):
    """Resnets of one resolution, each followed by attention where the config wants it."""

    def __init__(self, blocks: int, inputs, width, resnet: Callable):
        self.block = Layers(resnet(inputs if i == 0 else width, width) for i in range(blocks))

    def __call__(self, x, name=""):
        for i, block in enumerate(self.block):
            x = tap(f"{name}.{i}", block(x))
            x = self.attn[i](x) if len(self.attn) else x
        return x


class Mid(nnx.Module):
    def __init__(self, width, resnet: Callable, attend: Callable):
        self.block_1, self.attn_1, self.block_2 = resnet(width, width), attend(width), resnet(width, width)

    def __call__(self, x, name: str):
        return self.block_2(tap(f"{name}.mid.attn_1", self.attn_1(self.block_1(x))))


class Make:
    """Parts by the names that configs use."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs):
        self.kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.norm = lambda width: GroupNorm(width, param_dtype=cfg.param_dtype)

    def causal(self, inputs, outputs, kernel, **options):
        return CausalConv3d(inputs, outputs, kernel, time_mode="edge", **options, **self.kwargs)

    def frames(self, inputs, outputs, kernel, strides=1, padding=None):
        """Each frame by itself: time is one more batch axis."""
        pads = padding or ((kernel // 2, kernel // 2),) * 2
        return Plain(Conv(inputs, outputs, (kernel, kernel), strides=strides, padding=pads, **self.kwargs))

    def conv(self, name: str) -> Callable:
        return _named({"CausalConv3d": self.causal, "Conv2d": self.frames}, name)

    def resnet(self, name: str) -> Callable:
        param_dtype = self.kwargs["param_dtype"]
        parts = {
            "ResnetBlock3D": lambda a, b: ResnetBlock(a, b, self.causal, param_dtype=param_dtype),
            "ResnetBlock2D": lambda a, b: FrameResnet(a, b, self.frames, param_dtype=param_dtype),
        }
        return _named(parts, name)

    def attention(self, name: str) -> Callable:
        line = lambda a, b, size: Plain(Conv(a, b, (size,) * 3, **self.kwargs))
        parts = {
            "AttnBlock3D": lambda width: Attention(width, self.causal, self.norm, "scrambled"),
            "AttnBlock3DFix": lambda width: Attention(width, self.causal, self.norm, "space"),
            "AttnBlock": lambda width: Attention(width, self.frames, self.norm, "frame"),
            "TemporalAttnBlock": lambda width: Attention(width, line, self.norm, "time"),
        }
        return _named(parts, name)

    def resample(self, name: str, width: int):
        if not name:
            return None
        corner = ((0, 1), (0, 1))
        halve = lambda: Conv(width, width, (1, 3, 3), strides=(1, 2, 2), padding=((0, 0), *corner), **self.kwargs)
        parts = {
            "SpatialDownsample2x": lambda: Down(halve()),
            "Downsample": lambda: Down(self.frames(width, width, 3, 2, corner)),
            "SpatialUpsample2x": lambda: Up(self.causal(width, width, (1, 3, 3))),
            "Upsample": lambda: Up(self.frames(width, width, 3)),
            "TimeDownsample2x": lambda: TimeDown(None),
            "TimeDownsampleRes2x": lambda: TimeDown(Plain(self.causal(width, width, 3, strides=(2, 1, 1)))),
            "TimeUpsample2x": lambda: TimeUp(None),
            "TimeUpsampleRes2x": lambda: TimeUp(self.causal(width, width, 3)),
        }
        return _named(parts, name)()


def _named(parts: dict, name: str):
    if name not in parts:
        raise UserError(f"causal_vae: no part is called {name!r}; choose one of {', '.join(parts)}")
    return parts[name]


class Plain(nnx.Module):
    """A convolution that checkpoints name directly; causal ones carry a wrapper's name more."""

    def __init__(self, conv):
        self.plain = conv

    def __call__(self, x):
        return self.plain(x)


class FrameResnet(ResnetBlock):
    """Normalised frame by frame, too."""

    def __call__(self, x):
        return super().__call__(x.reshape(-1, 1, *x.shape[2:])).reshape(*x.shape[:4], -1)


class Attention(nnx.Module):
    """Single-head self-attention over the pixels of a frame ("space"; "frame" normalises by frame as well), over the
    frames of a pixel ("time"), or over what a [C, T, H W] buffer holds when it is read as [T, C, H W] ("scrambled")."""

    def __init__(self, width, conv: Callable, norm: Callable, over: str):
        self.over, self.norm = over, norm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def __call__(self, x):
        b, t, h, w, c = x.shape
        y = self.norm(x.reshape(-1, 1, h, w, c)).reshape(x.shape) if self.over == "frame" else self.norm(x)
        if self.over == "scrambled":
            rows = lambda a: jnp.moveaxis(a, -1, 1).reshape(b * t, c, h * w).swapaxes(1, 2)
            back = lambda a: jnp.moveaxis(a.swapaxes(1, 2).reshape(b, c, t, h, w), 1, -1)
        elif self.over == "time":
            rows = lambda a: jnp.moveaxis(a, 1, 3).reshape(b * h * w, t, c)
            back = lambda a: jnp.moveaxis(a.reshape(b, h, w, t, c), 3, 1)
        else:
            rows = lambda a: a.reshape(b * t, h * w, c)
            back = lambda a: a.reshape(x.shape)
        q, k, v = (rows(project(y))[:, :, None] for project in (self.q, self.k, self.v))
        return x + self.proj_out(back(attention(q, k, v)[:, :, 0]))


class Down(nnx.Module):
    def __init__(self, conv):
        self.conv = conv  # pads right and below only, like Stable Diffusion's

    def __call__(self, x):
        return self.conv(x)


class Up(nnx.Module):
    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x):
        return self.conv(upsample_nearest(x, (1, 2, 2)))


class Mixed(nnx.Module):
    """A resampling of time without parameters, or its mixture with a convolution by a learned factor."""

    def __init__(self, conv):
        self.conv = conv
        self.mix_factor = None if conv is None else nnx.Param(jnp.full(1, 2.0))

    def mix(self, plain, x):
        if self.conv is None:
            return plain
        share = jax.nn.sigmoid(self.mix_factor[...]).astype(plain.dtype)
        return share * plain + (1 - share) * self.conv(x)


class TimeDown(Mixed):
    """Frame i of the result is the mean of frames 2i - 2 ... 2i; before the first there are copies of it."""

    def __call__(self, x):
        padded = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)), mode="edge")
        count = (x.shape[1] + 1) // 2
        pooled = sum(padded[:, i : i + 2 * count - 1 : 2] for i in range(3)) / 3
        return self.mix(pooled, x)


class TimeUp(Mixed):
    """The first frame stays, the others are doubled by linear interpolation."""

    def __call__(self, x):
        first, rest = x[:, :1], x[:, 1:]
        if rest.shape[1]:
            padded = jnp.pad(rest, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
            earlier, later = 0.25 * padded[:, :-2] + 0.75 * rest, 0.75 * rest + 0.25 * padded[:, 2:]
            pairs = jnp.stack([earlier, later], 2).reshape(rest.shape[0], -1, *rest.shape[2:])
            x = jnp.concatenate([first, pairs], 1)
        return self.mix(x, x)
