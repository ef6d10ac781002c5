"""STDiT3 of Open-Sora 1.3 (1.2B): 16 latent channels; temporal blocks attend jointly over space and time inside windows
that do not shift; RoPE in three axes, in spatial blocks too; given frames (image or video to video) come in through
embedders of their own and read the null caption.

The 1.2 network, with attention along single axes, is models/stdit3.py.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.attention import SelfAttention
from opensora_jax.nn.blocks import STREAM, TextBlock
from opensora_jax.nn.embeddings import CaptionEmbedder, PatchEmbed3D, SizeEmbedder, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Linear, normal, xavier, zeros
from opensora_jax.nn.modulate import by_frame, drop_path
from opensora_jax.nn.params import Fixed
from opensora_jax.nn.positions import grid_sincos, resolution_scale, rope_3d, rope_frequencies, rope_table
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain


@dataclass(frozen=True)
class Config:
    input_sq_size: int = 512  # the square size at which positions have unit scale
    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True  # twice the channels out; rectified flow ignores the second half
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    kernel_size: tuple[int, int, int] | None = None  # window of temporal blocks: height, width, frames; -1 = all
    use_spatial_rope: bool = False
    skip_temporal: bool = False  # images only: no temporal blocks
    skip_y_embedder: bool = False  # captions arrive projected to hidden_size
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        head_dim = self.hidden_size // self.num_heads
        if self.kernel_size is not None and head_dim % 6:
            raise UserError(
                f"stdit3_v13: kernel_size rotates in three axes, but a head of {head_dim} is no multiple of 6"
            )
        if self.use_spatial_rope and self.kernel_size is None:
            raise UserError("stdit3_v13: use_spatial_rope needs kernel_size, the window of temporal attention")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def rope_dim(self) -> int:
        return self.hidden_size // self.num_heads // (1 if self.kernel_size is None else 3)


RELEASED = Config(kernel_size=(8, 8, -1), use_spatial_rope=True)
PRESETS = {
    "STDiT3-XL/2-v1.3": RELEASED,
    "STDiT3-3B/2-v1.3": Config(hidden_size=1872, num_heads=26, kernel_size=(8, 8, -1), use_spatial_rope=True),
    "STDiT3-XL/2-v1.3-axial": Config(),
}
REPOSITORIES = {"STDiT3-XL/2-v1.3": "hpcai-tech/OpenSora-STDiT-v4"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "STDiT3":
    return STDiT3(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    latents = array(shape.frames, shape.height, shape.width, cfg.in_channels)
    return {
        "x": latents,
        "t": array(),
        "y": array(shape.text_tokens, cfg.hidden_size if cfg.skip_y_embedder else cfg.caption_channels),
        "text_mask": array(shape.text_tokens, dtype="int32"),
        "x_mask": array(shape.frames, dtype="bool"),
        "fps": array(),
        "height": array(),
        "width": array(),
        "cond": latents,
        "cond_mask": latents,
    }


def block(cfg: Config, mode: str, rngs: nnx.Rngs) -> TextBlock:
    kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
    out = zeros if mode == "temporal" else None  # temporal layers begin as the identity
    attn = SelfAttention(cfg.hidden_size, cfg.num_heads, qk_norm=cfg.qk_norm, init_out=out, **kwargs)
    return TextBlock(attn, cfg.hidden_size, cfg.num_heads, cfg.mlp_ratio, init_cross=out, init_mlp=out, **kwargs)


class STDiT3(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, **kwargs)
        self.x_embedder_cond = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, init=zeros, **kwargs)
        self.x_embedder_cond_mask = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, init=zeros, **kwargs)
        self.t_embedder = TimestepEmbedder(width, init=xavier, **kwargs)
        self.fps_embedder = SizeEmbedder(width, init=normal(0.02), init_out=zeros, **kwargs)
        self.t_block = Linear(width, 6 * width, ("embed", None), **kwargs)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length, init=xavier, **kwargs)
        make = lambda mode: stack(lambda r: block(cfg, mode, r), cfg.depth, rngs=rngs)
        self.spatial_blocks = make("spatial")
        self.temporal_blocks = None if cfg.skip_temporal else make("temporal")
        self.rope_freqs = Fixed(jnp.asarray(rope_frequencies(cfg.rope_dim), cfg.param_dtype))
        self.final_layer = T2IFinalLayer(width, math.prod(cfg.patch_size) * cfg.out_channels, **kwargs)

    def __call__(
        self, x, t, y, text_mask=None, x_mask=None, *, fps, height, width, cond=None, cond_mask=None, mask_index=None,
        y_null=None, drop_text=None, key=None,
    ):  # fmt: skip
        """x [B, T, H, W, C] latents; t [B] in [0, 1000]; y [B, L, D]; x_mask [B, T], True = generated frame; height and
        width in pixels [B]; drop_text [B] bool; key: for drop path. Returns [B, T, H, W, out] float32.

        cond, cond_mask (like x): latents of given frames, and 1 where given; trained with zeros when nothing is given.
        mask_index: the frames given, by number or as a mask [T], which read y_null [B, L, D] (by default the learned
        null) instead of y.
        """
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        scale = resolution_scale(height, width, cfg.input_sq_size)
        tokens, grid = self._tokens(x, cond, cond_mask, scale)
        batch = tokens.shape[0]

        fps = tap("fps_emb", self.fps_embedder(fps))
        t_vec = tap("t_emb", self.t_embedder(t)) + fps
        condition_vec = self.t_embedder(jnp.zeros_like(t)) + fps if x_mask is not None else t_vec
        modulation = by_frame(
            tap("t_block_out", self.t_block(jax.nn.silu(t_vec))), self.t_block(jax.nn.silu(condition_vec)), x_mask
        )
        text = self._text(y, text_mask, drop_text, mask_index, y_null, tokens.shape)
        spatially, temporally = self._attention(grid, scale)

        def pair(h, layers):
            spatial, temporal, keep = layers
            keep = (None, None) if keep is None else (keep[:2], keep[2:])
            h = tap("spatial_out", spatial(h, spatially, text, modulation, keep=keep[0]))
            if temporal is None:
                return h
            return tap("temporal_out", temporal(h, temporally, text, modulation, mode="temporal", keep=keep[1]))

        layers = (self.spatial_blocks, self.temporal_blocks, drop_path(key, cfg.drop_path, (cfg.depth, 4, batch)))
        tokens = run_stack(pair, tokens, layers, remat=cfg.remat)

        out = self.final_layer(tokens, t_vec, x_mask, condition_vec)
        out = unpatchify(out.reshape(batch, *grid, out.shape[-1]), cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _tokens(self, x, cond, cond_mask, scale):
        """[B, T', S, C] and the grid (T', H', W')."""
        cfg = self.cfg
        tokens = self.x_embedder(x.astype(cfg.dtype))
        if cond is not None:
            tokens = tokens + self.x_embedder_cond(cond.astype(cfg.dtype))
            tokens = tokens + self.x_embedder_cond_mask(cond_mask.astype(cfg.dtype))
        batch, length, grid_h, grid_w, dim = tokens.shape
        base = round((grid_h * grid_w) ** 0.5)
        tokens = tokens + grid_sincos((grid_h, grid_w), dim, scale=scale, base=base).astype(cfg.dtype)
        tokens = tokens.reshape(batch, length, grid_h * grid_w, dim)
        return tap("tokens", constrain(tokens, *STREAM)), (length, grid_h, grid_w)

    def _text(self, y, text_mask, drop_text, mask_index, y_null, shape) -> dict:
        """Arguments of the cross-attention. With given frames both captions are read in one call, where a frame sees
        only the caption of its own kind; both have the mask of y, as trained."""
        cfg = self.cfg
        embed = lambda y, drop=None: (
            y.astype(cfg.dtype) if cfg.skip_y_embedder else self.y_embedder(y.astype(cfg.dtype), drop)
        )
        text = tap("y_emb", embed(y, drop_text))
        if mask_index is None or len(mask_index) == 0:
            return {"y": text, "text_mask": text_mask}
        (batch, length, space, _), tokens = shape, y.shape[1]
        if y_null is None:
            stored = self.y_embedder.null[...]
            null = self.y_embedder(stored[jnp.arange(tokens) % stored.shape[0]][None].astype(cfg.dtype))
        else:
            null = embed(y_null)
        null = jnp.broadcast_to(null, text.shape)
        given = jnp.asarray(mask_index)
        given = given.astype(jnp.int32) if given.dtype == bool else jnp.zeros(length, jnp.int32).at[given].set(1)
        of_queries = jnp.broadcast_to(jnp.repeat(given, space), (batch, length * space))
        visible = jnp.ones((batch, tokens), bool) if text_mask is None else text_mask.astype(bool)
        of_keys = jnp.concatenate([jnp.where(visible, kind, -1) for kind in (0, 1)], 1)
        return {"y": jnp.concatenate([text, null], 1), "segments": (of_queries, of_keys)}

    def _attention(self, grid, scale):
        """How spatial and temporal blocks attend."""
        window, frequencies = self.cfg.kernel_size, self.rope_freqs[...]
        if window is None:
            along_time = rope_table(jnp.arange(grid[0]), frequencies)
            return (
                lambda attn, h: attn(h, mode="spatial"),
                lambda attn, h: attn(h, mode="temporal", rope=along_time),
            )
        high, wide, long = (size if k < 0 else k for k, size in zip(window, (*grid[1:], grid[0])))
        in_window = rope_3d((long, high, wide), frequencies, scale)
        in_frame = rope_3d((1, *grid[1:]), frequencies, scale) if self.cfg.use_spatial_rope else None
        return (
            lambda attn, h: attn(h, mode="spatial", rope=in_frame),
            lambda attn, h: windowed(attn, h, grid, (long, high, wide), in_window),
        )


def windowed(attn, x, grid, window, rope):
    """Self-attention inside windows of frames x height x width; x [B, T, S, C]. The grid is padded at the end of each
    axis to whole windows, and padding is hidden."""
    batch, _, _, dim = x.shape
    counts = [-(-size // w) for size, w in zip(grid, window)]
    padded = [n * w for n, w in zip(counts, window)]
    pads = [(0, p - size) for p, size in zip(padded, grid)]

    def split(a, fold):
        """[b, T, H, W, ...] → [fold, windows / fold, tokens of a window, ...]."""
        a = jnp.pad(a, [(0, 0), *pads] + [(0, 0)] * (a.ndim - 4))
        a = a.reshape(a.shape[0], *[n for pair in zip(counts, window) for n in pair], *a.shape[4:])
        a = a.transpose(0, 1, 3, 5, 2, 4, 6, *range(7, a.ndim))
        return a.reshape(*fold, math.prod(window), *a.shape[7:])

    mask = None
    fold = (batch, math.prod(counts))
    if padded != list(grid):
        fold = (batch * math.prod(counts), 1)  # a mask belongs to a batch entry, so each window becomes one
        visible = split(np.ones((1, *grid), bool), (math.prod(counts),))
        mask = jnp.tile(visible, (batch, 1))
    h = constrain(split(x.reshape(batch, *grid, dim), fold), "batch", "space", None, None)
    h = attn(h, mode="spatial", rope=rope, kv_mask=mask)
    h = h.reshape(batch, *counts, *window, dim).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *padded, dim)
    return h[:, : grid[0], : grid[1], : grid[2]].reshape(x.shape)
