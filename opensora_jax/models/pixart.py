"""PixArt: alpha (Chen et al. 2023), its multi-scale and 1B variants, and Sigma (2024) with key/value compression; for
images and, as Open-Sora 1.0 ported it, for video with full attention over all frames.

A patch of two numbers is the original's image network. Position tables depend on the patch grid and on `base_size`, the
grid side of training, so one network serves every size; the reference's `input_size` only sets that side.
"""

import math
from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.full import full_attention, pad_to_shares
from opensora_jax.nn.attention import SelfAttention
from opensora_jax.nn.blocks import STREAM, TextBlock
from opensora_jax.nn.embeddings import CaptionEmbedder, PatchEmbed3D, SizeEmbedder, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Conv, Linear, normal, zeros
from opensora_jax.nn.modulate import drop_path
from opensora_jax.nn.norms import LayerNorm
from opensora_jax.nn.positions import grid_sincos, sincos_1d
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain

SAMPLING = ("conv", "ave", "uniform", "uniform_every")


@dataclass(frozen=True)
class Config:
    in_channels: int = 4
    patch_size: tuple[int, ...] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    drop_path: float = 0.0
    no_temporal_pos_emb: bool = False
    caption_channels: int = 4096
    model_max_length: int = 120
    base_size: int = 16  # patches a side of the square that positions are stretched to
    space_scale: float = 1.0
    time_scale: float = 1.0
    micro_condition: bool = False  # multi-scale: pixel size and aspect ratio join the timestep
    qk_norm: bool = False
    kv_compress_layers: tuple[int, ...] = ()  # these attend to fewer keys and values,
    kv_compress_factor: int = 1  # fewer by this factor a side ("uniform_every": of the token count)
    kv_compress_sampling: str = "conv"  # a learned average; "ave" and "uniform" keep every n-th row and column
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.micro_condition and self.hidden_size % 3:
            raise UserError(f"pixart: hidden_size {self.hidden_size} is no multiple of 3 (height, width, aspect ratio)")
        if self.kv_compress_sampling not in SAMPLING:
            known = ", ".join(SAMPLING)
            raise UserError(
                f"pixart: kv_compress_sampling={self.kv_compress_sampling!r} is unknown; choose one of {known}"
            )
        if any(not 0 <= layer < self.depth for layer in self.kv_compress_layers):
            raise UserError(f"pixart: kv_compress_layers {self.kv_compress_layers} exceed the depth of {self.depth}")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def kv_factor(self, layer: int) -> int:
        return self.kv_compress_factor if layer in self.kv_compress_layers else 1

    @property
    def learned_layers(self) -> tuple[int, ...]:
        """Those whose compression has parameters."""
        learned = self.kv_compress_sampling == "conv" and self.kv_compress_factor > 1
        return self.kv_compress_layers if learned else ()


IMAGE = dict(no_temporal_pos_emb=True)
ORIGINAL = dict(patch_size=(2, 2), no_temporal_pos_emb=True)
SIGMA = dict(**ORIGINAL, model_max_length=300)
PRESETS = {
    "PixArt-XL/2": Config(),
    "PixArt-XL/2-256": Config(**IMAGE),
    "PixArt-XL/2-512": Config(base_size=32, **IMAGE),
    "PixArt-1B/2": Config(hidden_size=1872, num_heads=26, model_max_length=300, **IMAGE),
    "PixArtMS-XL/2-1024": Config(base_size=64, space_scale=2.0, micro_condition=True, **IMAGE),
    "PixArt-alpha-XL/2-256": Config(**ORIGINAL),
    "PixArt-alpha-XL/2-512": Config(base_size=32, **ORIGINAL),
    "PixArt-alpha-XL/2-1024-MS": Config(base_size=64, space_scale=2.0, micro_condition=True, **ORIGINAL),
    "PixArt-Sigma-XL/2-256": Config(space_scale=0.5, **SIGMA),
    "PixArt-Sigma-XL/2-512-MS": Config(base_size=32, **SIGMA),
    "PixArt-Sigma-XL/2-1024-MS": Config(base_size=64, space_scale=2.0, **SIGMA),
    "PixArt-Sigma-XL/2-1024-MS-kvcompress": Config(
        base_size=64, space_scale=2.0, kv_compress_layers=tuple(range(14, 28)), kv_compress_factor=2, **SIGMA
    ),
    "PixArt-Sigma-XL/2-2K-MS": Config(base_size=128, space_scale=4.0, **SIGMA),
}
REPOSITORIES = {
    "PixArt-alpha-XL/2-256": "PixArt-alpha/PixArt-alpha/PixArt-XL-2-256x256.pth",
    "PixArt-alpha-XL/2-512": "PixArt-alpha/PixArt-alpha/PixArt-XL-2-512x512.pth",
    "PixArt-alpha-XL/2-1024-MS": "PixArt-alpha/PixArt-alpha/PixArt-XL-2-1024-MS.pth",
    "PixArt-Sigma-XL/2-256": "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-256x256.pth",
    "PixArt-Sigma-XL/2-512-MS": "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-512-MS.pth",
    "PixArt-Sigma-XL/2-1024-MS": "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-1024-MS.pth",
    "PixArt-Sigma-XL/2-2K-MS": "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-2K-MS.pth",
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "PixArt":
    return PixArt(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    arrays = {
        "x": array(shape.frames, shape.height, shape.width, cfg.in_channels),
        "t": array(),
        "y": array(shape.text_tokens, cfg.caption_channels),
        "text_mask": array(shape.text_tokens, dtype="int32"),
    }
    return arrays | ({name: array() for name in ("height", "width", "ar")} if cfg.micro_condition else {})


class Compressor(nnx.Module):
    """A depthwise convolution that begins as the average of each square, and a norm."""

    def __init__(self, width, factor, *, dtype, param_dtype, rngs):
        average = nnx.initializers.constant(1 / factor**2)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.sr = Conv(
            width,
            width,
            (factor, factor),
            strides=factor,
            groups=width,
            init=average,
            axes=(None, "conv_out"),
            **kwargs,
        )
        self.norm = LayerNorm(width, eps=1e-5, param_dtype=param_dtype)

    def __call__(self, x_bthwc):
        return self.norm(self.sr(x_bthwc))


def attend_compressed(attn: SelfAttention, x, grid, factor: int, compress):
    """Full attention of all tokens to compressed keys and values; x [B, 1, N, C] with the tokens of grid (T, H, W) and
    perhaps padding behind them."""
    batch, dim = x.shape[0], x.shape[-1]
    q, k, v = jnp.split(attn.qkv(x).reshape(batch, -1, 3 * dim), 3, -1)
    grids = (part[:, : math.prod(grid)].reshape(batch, *grid, dim) for part in (k, v))
    k, v = (compress(part).reshape(batch, -1, dim) for part in grids)
    split = lambda a: a.reshape(batch, a.shape[1], attn.heads, -1)
    q, k, v = split(q), split(k), split(v)
    if attn.q_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    return attn.proj(full_attention(q, k, v).reshape(x.shape))


def strided(x_bthwc, factor: int, sampling: str):
    """Keys and values that are kept without learning: a rest that fills no whole square is left out."""
    batch, length, height, width, dim = x_bthwc.shape
    if sampling == "uniform_every":
        return x_bthwc.reshape(batch, length * height * width, dim)[:, ::factor]
    return x_bthwc[:, :, : height // factor * factor : factor, : width // factor * factor : factor]


def block(cfg: Config, rngs: nnx.Rngs) -> TextBlock:
    kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
    attn = SelfAttention(cfg.hidden_size, cfg.num_heads, qk_norm=cfg.qk_norm, **kwargs)
    return TextBlock(attn, cfg.hidden_size, cfg.num_heads, cfg.mlp_ratio, init_cross=zeros, **kwargs)


class PixArt(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, **kwargs)
        self.t_embedder = TimestepEmbedder(width, **kwargs)
        self.csize_embedder = SizeEmbedder(width // 3, **kwargs) if cfg.micro_condition else None
        self.ar_embedder = SizeEmbedder(width // 3, **kwargs) if cfg.micro_condition else None
        self.t_block = Linear(width, 6 * width, ("embed", None), init=normal(0.02), **kwargs)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length, **kwargs)
        self.blocks = stack(lambda r: block(cfg, r), cfg.depth, rngs=rngs)
        factor = cfg.kv_compress_factor
        self.compressors = nnx.Dict({str(i): Compressor(width, factor, **kwargs) for i in cfg.learned_layers})
        outputs = math.prod(cfg.patch_size) * cfg.out_channels
        self.final_layer = T2IFinalLayer(width, outputs, init=zeros, **kwargs)

    def __call__(self, x, t, y, text_mask=None, *, height=None, width=None, ar=None, drop_text=None, key=None):
        """x [B, T, H, W, C] latents; t [B] in [0, 1000); y [B, L, D]; with micro_condition height, width and ar (height /
        width) [B] in pixels; drop_text [B] bool; key: for drop path. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        tokens, grid = self._tokens(x)
        batch = tokens.shape[0]

        t_vec = tap("t_emb", self.t_embedder(t))
        if cfg.micro_condition:
            size = self.csize_embedder(jnp.stack([height, width], -1))
            t_vec = t_vec + jnp.concatenate([size, self.ar_embedder(ar)], -1)
        modulation = tap("t_block_out", self.t_block(jax.nn.silu(t_vec)))[:, None]
        text = {"y": tap("y_emb", self.y_embedder(y.astype(cfg.dtype), drop_text)), "text_mask": text_mask}
        keep = drop_path(key, cfg.drop_path, (cfg.depth, 2, batch))
        tokens = self._run(tokens, grid, text, modulation, keep)

        out = self.final_layer(tokens, t_vec)
        out = out.reshape(batch, -1, out.shape[-1])[:, : math.prod(grid)]
        out = unpatchify(out.reshape(batch, *grid, out.shape[-1]), cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _tokens(self, x):
        """[B, 1, T*S, C], since all frames attend to each other, and the grid (T, H', W')."""
        cfg = self.cfg
        tokens = tap("patches", self.x_embedder(x.astype(cfg.dtype)))
        batch, length, *grid, dim = tokens.shape
        tokens = tokens + grid_sincos(tuple(grid), dim, scale=cfg.space_scale, base=cfg.base_size).astype(cfg.dtype)
        if not cfg.no_temporal_pos_emb:
            when = sincos_1d(np.arange(length) / cfg.time_scale, dim).astype(cfg.dtype)
            tokens = tokens + when[:, None, None]
        return tokens.reshape(batch, 1, -1, dim), (length, *grid)

    def _run(self, tokens, grid, text, modulation, keep):
        """Runs of layers with the same compression are one scan each; returned with the padding."""
        cfg = self.cfg
        tokens, visible = pad_to_shares(tokens, 2)
        tokens = tap("tokens", constrain(tokens, *STREAM))
        for factor, run in groupby(range(cfg.depth), cfg.kv_factor):
            layers = list(run)
            part = lambda tree, first=layers[0], last=layers[-1] + 1: jax.tree.map(lambda leaf: leaf[first:last], tree)
            learned = None
            if layers[0] in cfg.learned_layers:
                learned = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[self.compressors[str(i)] for i in layers])

            def layer(h, entry, factor=factor):
                module, compressor, kept = entry
                if factor == 1:
                    attend = lambda attn, h: attn(h, mode="full", visible=visible)
                else:
                    compress = compressor or (lambda kv: strided(kv, factor, cfg.kv_compress_sampling))
                    attend = lambda attn, h: attend_compressed(attn, h, grid, factor, compress)
                return tap("out", module(h, attend, text, modulation, mode="full", keep=kept))

            whole = len(layers) == cfg.depth
            entries = (self.blocks, learned, keep) if whole else (part(self.blocks), learned, part(keep))
            tokens = run_stack(layer, tokens, entries, remat=cfg.remat, first=layers[0])
        return tokens
