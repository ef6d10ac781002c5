"""Deep-compression autoencoder (DC-AE, arXiv 2410.10733) for video, the high-compression VAE of Open-Sora 2.0:
4 x 32 x 32 fewer positions, 128 channels, no sampling, not causal.

Every change of size has a shortcut without parameters: pixels move into channels and are averaged, or channels are
repeated and move into pixels. The inner stages are EfficientViT blocks: linear attention over the whole clip (or image)
at several scales, then a gated depthwise convolution. A single frame is never halved or doubled in time.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn import taps
from opensora_jax.nn.activations import activation
from opensora_jax.nn.conv import upsample_nearest
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.norms import LayerNorm, RMSNorm
from opensora_jax.vaes import tiling
from opensora_jax.vaes.posterior import Reconstruction

HEAD = 32  # channels of an attention head
BLOCKS = {"EViT_GLU": (), "EViTS5_GLU": (5,)}  # → kernel sizes of the further scales of attention
DEFAULT_BLOCKS = ("ResBlock",) * 3 + ("EViTS5_GLU",) * 3


@dataclass(frozen=True)
class Half:
    """The encoder, or the decoder in mirror image: lists run from full size to latents in both."""

    width_list: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    depth_list: tuple[int, ...] = (2, 2, 2, 3, 3, 3)  # a first stage of depth 0 is skipped, project_in halves instead
    block_type: tuple[str | tuple[str, ...], ...] = DEFAULT_BLOCKS  # a stage, or each block of it
    norm: str | tuple[str, ...] = "rms3d"
    act: str | tuple[str, ...] = "silu"
    pixel_shuffle: bool = False  # size changes by a convolution and pixel shuffle, not by stride or interpolation
    match_channel: bool = True  # the layer that changes the size changes the width, too
    shortcut: bool = True  # around layers that change the size
    latent_shortcut: bool = True  # around the convolution next to the latents
    out_norm: str | None = None
    out_act: str | None = None
    temporal: tuple[bool, ...] = (False, False, False, True, True, False)  # is time halved after this stage?

    def of_stage(self, name: str, stage: int):
        value = getattr(self, name)
        return value if isinstance(value, str) else value[stage]

    def blocks(self, stage: int) -> tuple[str, ...]:
        types = self.of_stage("block_type", stage)
        return (types,) * self.depth_list[stage] if isinstance(types, str) else tuple(types)

    def factors(self, stage: int, video: bool) -> tuple[int, ...]:
        return (2 if self.temporal and self.temporal[stage] else 1, 2, 2) if video else (2, 2)


ENCODER = Half()
DECODER = Half(depth_list=(3,) * 6, out_norm="rms3d", out_act="relu")


@dataclass(frozen=True)
class Config:
    in_channels: int = 3
    latent_channels: int = 128
    encoder: Half = field(default_factory=lambda: ENCODER)
    decoder: Half = field(default_factory=lambda: DECODER)
    is_video: bool = True  # False: an image network, frame by frame
    double_latent: bool = False  # the encoder gives twice the channels
    time_compression_ratio: int = 4
    spatial_compression_ratio: int = 32
    scaling_factor: float | None = None  # latents are divided by it
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256
    temporal_tile_size: int = 32
    tile_overlap_factor: float = 0.25
    use_slicing: bool = False  # one sample at a time
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("encoder", "decoder"):
            if isinstance(half := getattr(self, name), dict):  # as files hold it
                object.__setattr__(self, name, Half(**half))

    @property
    def rank(self) -> int:
        return 3 if self.is_video else 2


PRESETS = {
    "dc-ae-f32t4c128": Config(),
    "dc-ae-f32t4c128_tiled": Config(use_spatial_tiling=True, use_temporal_tiling=True),
}
REPOSITORIES = dict.fromkeys(PRESETS, "hpcai-tech/Open-Sora-v2-Video-DC-AE/F32T4C128_AE.safetensors")


def build(cfg: Config, *, rngs: nnx.Rngs) -> "DCAE":
    return DCAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    sides = (shape.height * cfg.spatial_compression_ratio, shape.width * cfg.spatial_compression_ratio)
    frames = shape.frames * cfg.time_compression_ratio if shape.frames > 1 else 1
    return {"x": jax.ShapeDtypeStruct((shape.batch, frames, *sides, cfg.in_channels), "float32")}


def latent_size(cfg: Config, frames, height, width) -> tuple:
    """Pixels (T, H, W) → latents, rounded up; None stays None."""
    ratios = (cfg.time_compression_ratio, cfg.spatial_compression_ratio, cfg.spatial_compression_ratio)
    return tuple(None if n is None else (n - 1) // ratio + 1 for n, ratio in zip((frames, height, width), ratios))


class DCAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.encoder = Encoder(cfg, **kwargs)
        self.decoder = Decoder(cfg, **kwargs)

    def encode(self, x, key=None):
        """[B, T, H, W, 3] in [-1, 1] → latents [B, T', h, w, z]. There is nothing to sample: the key is not used."""
        time, space = self._tiles(encoding=True)
        return self._run(self.encoder, x, time, space) / (self.cfg.scaling_factor or 1.0)

    def decode(self, z, num_frames=None):
        """Latents → [B, T, H, W, 3] float32, cut to num_frames."""
        time, space = self._tiles(encoding=False)
        out = self._run(self.decoder, z * (self.cfg.scaling_factor or 1.0), time, space)
        return out[:, :num_frames].astype(jnp.float32)

    def __call__(self, x, key=None):
        """Reconstruction, for training; the latents have no distribution."""
        return Reconstruction(self.decode(self.encode(x)), None)

    def _tiles(self, *, encoding: bool) -> tuple[tiling.Tiles | None, tiling.Tiles | None]:
        """Of time and of space, where they are in use."""
        cfg = self.cfg
        order = 1 if encoding else -1
        tiles = partial(tiling.Tiles.of, overlap=cfg.tile_overlap_factor)
        time = (cfg.temporal_tile_size, cfg.temporal_tile_size // cfg.time_compression_ratio)[::order]
        space = (cfg.spatial_tile_size, cfg.spatial_tile_size // cfg.spatial_compression_ratio)[::order]
        return tiles(*time) if cfg.use_temporal_tiling else None, tiles(*space) if cfg.use_spatial_tiling else None

    def _run(self, network, x, time: tiling.Tiles | None, space: tiling.Tiles | None):
        def one(x):
            if self.cfg.is_video:
                return network(x)
            frames = network(x.reshape(-1, *x.shape[2:]))
            return frames.reshape(*x.shape[:2], *frames.shape[1:])

        run = partial(tiling.run, one, time=time, space=space)
        x = x.astype(self.cfg.dtype)
        return jax.lax.map(lambda sample: run(sample[None])[0], x) if self.cfg.use_slicing and len(x) > 1 else run(x)


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        half, conv = cfg.encoder, partial(ConvLayer, rank=cfg.rank, **kwargs)
        widths, depths = half.width_list, half.depth_list
        last = len(widths) - 1

        def down(inputs, outputs, factors, shortcut):
            if half.pixel_shuffle:
                refuse_video(cfg, "ConvPixelUnshuffle")
                main = PixelUnshuffleConv(conv, inputs, outputs)
            else:
                main = conv(inputs, outputs, 3, strides=factors)
            return Residual(main, partial(average, outputs=outputs, factors=factors)) if shortcut else main

        if depths[0]:
            self.project_in = conv(cfg.in_channels, widths[0], 3)
        else:
            refuse_video(cfg, "a first stage of depth 0")
            self.project_in = down(cfg.in_channels, widths[1], (2, 2), False)
        stages = []
        for i, width in enumerate(widths):
            ops = [block(kind, width, half, i, conv, **kwargs) for kind in half.blocks(i)]
            if i < last and depths[i]:
                wider = widths[i + 1] if half.match_channel else width
                ops.append(down(width, wider, half.factors(i, cfg.is_video), half.shortcut))
            stages.append(Layers(ops))
        self.stages = Layers(stages)
        outputs = cfg.latent_channels * (2 if cfg.double_latent else 1)
        out = Ops([norm(half.out_norm, widths[-1], kwargs), half.out_act, conv(widths[-1], outputs, 3)])
        unit = partial(average, outputs=outputs, factors=(1,) * cfg.rank)
        self.project_out = Residual(out, unit) if half.latent_shortcut else out

    def __call__(self, x):
        with taps.scope("encoder."):
            x = taps.tap("project_in", self.project_in(x))
            for i, stage in enumerate(self.stages):
                for op in stage:
                    x = op(x)
                x = taps.tap(f"stages.{i}", x)
        return self.project_out(x)


class Decoder(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        half, conv = cfg.decoder, partial(ConvLayer, rank=cfg.rank, **kwargs)
        widths, depths = half.width_list, half.depth_list
        last = len(widths) - 1

        def up(inputs, outputs, factors, shortcut):
            if half.pixel_shuffle:
                refuse_video(cfg, "ConvPixelShuffle")
                main = PixelShuffleConv(conv, inputs, outputs)
            else:
                main = InterpolateConv(conv, inputs, outputs, factors)
            return Residual(main, partial(duplicate, outputs=outputs, factors=factors)) if shortcut else main

        first = conv(cfg.latent_channels, widths[-1], 3)
        unit = partial(duplicate, outputs=widths[-1], factors=(1,) * cfg.rank)
        self.project_in = Residual(first, unit) if half.latent_shortcut else first
        stages = []
        for i, width in enumerate(widths):
            above = widths[min(i + 1, last)]
            ops = []
            if i < last and depths[i]:
                ops.append(
                    up(above, width if half.match_channel else above, half.factors(i, cfg.is_video), half.shortcut)
                )
            ops += [block(kind, width, half, i, conv, **kwargs) for kind in half.blocks(i)]
            stages.append(Layers(ops))
        self.stages = Layers(stages)
        width = widths[0] if depths[0] else widths[1]
        if depths[0]:
            out = conv(width, cfg.in_channels, 3)
        else:
            refuse_video(cfg, "a first stage of depth 0")
            out = up(width, cfg.in_channels, (2, 2), False)
        self.project_out = Ops([norm(half.out_norm, width, kwargs), half.out_act, out])

    def __call__(self, z):
        with taps.scope("decoder."):
            x = taps.tap("project_in", self.project_in(z))
            for i in reversed(range(len(self.stages))):
                for op in self.stages[i]:
                    x = op(x)
                x = taps.tap(f"stages.{i}", x)
        return self.project_out(x)


def refuse_video(cfg: Config, what: str) -> None:
    if cfg.is_video:
        raise UserError(f"dc_ae: {what} is for image networks (is_video=False)")


def block(kind: str, width: int, half: Half, stage: int, conv, **kwargs) -> nnx.Module:
    make = lambda: norm(half.of_stage("norm", stage), width, kwargs)
    act = half.of_stage("act", stage)
    if kind == "ResBlock":
        return Residual(ResBlock(width, conv, make, act))
    if kind not in BLOCKS:
        raise UserError(f"dc_ae: block_type {kind!r} is unknown; choose one of ResBlock, {', '.join(BLOCKS)}")
    return EfficientViTBlock(width, BLOCKS[kind], conv, make, act)


def norm(name: str | None, width: int, kwargs: dict):
    """Over channels, at every position."""
    if name is None:
        return None
    if name in ("rms2d", "rms3d"):
        return RMSNorm(width, eps=1e-5, bias=True, param_dtype=kwargs["param_dtype"])
    if name == "ln2d":
        return LayerNorm(width, eps=1e-5, param_dtype=kwargs["param_dtype"])
    raise UserError(f"dc_ae: norm {name!r} is unknown; choose one of rms2d, rms3d, ln2d")


class ConvLayer(nnx.Module):
    """Convolution (symmetric zero padding), norm, activation."""

    def __init__(self, inputs, outputs, size, *, rank, strides=1, groups=1, bias=True, norm=None, act=None, **kwargs):
        self.conv = Conv(
            inputs, outputs, (size,) * rank, strides=strides, padding=[(size // 2, size // 2)] * rank, groups=groups,
            bias=bias, init=nnx.initializers.truncated_normal(0.02), **kwargs,
        )  # fmt: skip
        self.norm = norm
        self.act = act

    def __call__(self, x):
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else activation(self.act)(x)


class Residual(nnx.Module):
    def __init__(self, main, shortcut=None):
        self.main = main
        self.shortcut = shortcut

    def __call__(self, x):
        return self.main(x) + (x if self.shortcut is None else self.shortcut(x))


class Ops(nnx.Module):
    """Modules and names of activations, one after the other; absent ones do not count."""

    def __init__(self, ops):
        ops = [op for op in ops if op is not None]
        self.acts = tuple(op if isinstance(op, str) else None for op in ops)
        self.layers = Layers(None if act else op for op, act in zip(ops, self.acts))

    def __call__(self, x):
        for layer, act in zip(self.layers, self.acts):
            x = activation(act)(x) if act else layer(x)
        return x


class ResBlock(nnx.Module):
    def __init__(self, width, conv, norm, act):
        self.conv1 = conv(width, width, 3, act=act)
        self.conv2 = conv(width, width, 3, bias=False, norm=norm())

    def __call__(self, x):
        return self.conv2(self.conv1(x))


class EfficientViTBlock(nnx.Module):
    def __init__(self, width, scales, conv, norm, act):
        self.context_module = Residual(LinearAttention(width, scales, conv, norm))
        self.local_module = Residual(GatedConv(width, 4, conv, norm, act))

    def __call__(self, x):
        return self.local_module(self.context_module(x))


class LinearAttention(nnx.Module):
    """relu(q) (relu(k)^T v), normalised by relu(q) sum(relu(k)): cost grows with the positions, not their square. Each
    scale adds as many heads again, whose q, k and v are gathered from a neighbourhood."""

    def __init__(self, width, scales, conv, norm):
        total = width // HEAD * HEAD
        self.qkv = conv(width, 3 * total, 1, bias=False)
        gather = lambda size: Layers(
            [conv(3 * total, 3 * total, size, groups=3 * total, bias=False).conv,
             conv(3 * total, 3 * total, 1, groups=3 * total // HEAD, bias=False).conv]
        )  # fmt: skip
        self.aggreg = Layers(gather(size) for size in scales)
        self.proj = conv(total * (1 + len(scales)), width, 1, bias=False, norm=norm())

    def __call__(self, x):
        qkv = self.qkv(x)
        scales = [qkv, *(pointwise(depthwise(qkv)) for depthwise, pointwise in self.aggreg)]
        heads = jnp.concatenate(scales, -1).reshape(*x.shape[:-1], -1, 3 * HEAD)
        q, k, v = jnp.split(heads, 3, -1)  # [B, *space, heads, 32]: rows may be cut, positions in a line could not be
        q, k = jax.nn.relu(q), jax.nn.relu(k)
        at = "xyz"[: x.ndim - 2]
        total = partial(jnp.einsum, preferred_element_type=jnp.float32)
        context, mass = total(f"b{at}nk,b{at}nv->bnkv", k, v), k.astype(jnp.float32).sum(range(1, x.ndim - 1))
        seen = total(f"b{at}nk,bnkv->b{at}nv", q.astype(jnp.float32), context)
        weight = total(f"b{at}nk,bnk->b{at}n", q.astype(jnp.float32), mass)
        out = (seen / (weight + 1e-15)[..., None]).astype(x.dtype)
        return self.proj(out.reshape(*x.shape[:-1], -1))


class GatedConv(nnx.Module):
    """Widen, look around channel by channel, gate one half with the other, narrow."""

    def __init__(self, width, expand, conv, norm, act):
        hidden = 2 * expand * width
        self.act = act
        self.inverted_conv = conv(width, hidden, 1, act=act)
        self.depth_conv = conv(hidden, hidden, 3, groups=hidden)
        self.point_conv = conv(hidden // 2, width, 1, bias=False, norm=norm())

    def __call__(self, x):
        x, gate = jnp.split(self.depth_conv(self.inverted_conv(x)), 2, -1)
        return self.point_conv(x * activation(self.act)(gate))


class InterpolateConv(nnx.Module):
    def __init__(self, conv, inputs, outputs, factors):
        self.factors = factors
        self.conv = conv(inputs, outputs, 3)

    def __call__(self, x):
        return self.conv(upsample_nearest(x, in_time(self.factors, x)))


class PixelUnshuffleConv(nnx.Module):
    def __init__(self, conv, inputs, outputs):
        self.conv = conv(inputs, outputs // 4, 3)

    def __call__(self, x):
        return pixels_to_channels(self.conv(x), (2, 2))


class PixelShuffleConv(nnx.Module):
    def __init__(self, conv, inputs, outputs):
        self.conv = conv(inputs, outputs * 4, 3)

    def __call__(self, x):
        return channels_to_pixels(self.conv(x), (2, 2))


def in_time(factors, x):
    """A single frame keeps its one frame."""
    return (1, *factors[1:]) if len(factors) == 3 and x.shape[1] == 1 else factors


def average(x, *, outputs: int, factors):
    """Pixels into channels, then means of neighbouring channels."""
    x = pixels_to_channels(x, in_time(factors, x))
    return x.reshape(*x.shape[:-1], outputs, -1).mean(-1)


def duplicate(x, *, outputs: int, factors):
    """Channels repeated, then into pixels."""
    factors = in_time(factors, x)
    return channels_to_pixels(jnp.repeat(x, outputs * math.prod(factors) // x.shape[-1], -1), factors)


def pixels_to_channels(x, factors):
    """[B, *space, C] → [B, *(space / factors), C prod(factors)]; the old channel runs slowest."""
    batch, *space, channels = x.shape
    smaller = [side // factor for side, factor in zip(space, factors)]
    if any(side % factor for side, factor in zip(space, factors)):
        raise UserError(f"dc_ae: {space} positions do not split by {list(factors)}; pad or crop the clip")
    n = len(factors)
    x = x.reshape(batch, *(size for pair in zip(smaller, factors) for size in pair), channels)
    order = [0, *range(1, 2 * n, 2), 2 * n + 1, *range(2, 2 * n + 1, 2)]
    return x.transpose(order).reshape(batch, *smaller, -1)


def channels_to_pixels(x, factors):
    """The way back."""
    batch, *space, _ = x.shape
    n = len(factors)
    x = x.reshape(batch, *space, -1, *factors)
    order = [0, *(axis for i in range(n) for axis in (1 + i, n + 2 + i)), n + 1]
    return x.transpose(order).reshape(batch, *(side * factor for side, factor in zip(space, factors)), -1)
