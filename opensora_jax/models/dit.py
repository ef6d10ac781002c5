"""DiT (Peebles and Xie 2023), for images and, as Open-Sora 1.0 ported it, for video: full attention over all frames,
conditioned on the timestep plus a class or one pooled text vector through adaLN-Zero.

A patch of two numbers is the original's image network. Latte, which alternates space and time, is models/latte.py.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.full import pad_to_shares
from opensora_jax.nn.blocks import STREAM, ConditionBlock
from opensora_jax.nn.embeddings import CaptionEmbedder, LabelEmbedder, PatchEmbed3D, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import AdaLNFinalLayer
from opensora_jax.nn.positions import grid_sincos, sincos_1d
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain

SIZES = {  # of the DiT and Latte papers
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "S": dict(hidden_size=384, depth=12, num_heads=6),
}


@dataclass(frozen=True)
class Config:
    in_channels: int = 4
    patch_size: tuple[int, ...] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    condition: str = "text"  # one pooled vector; or label_K for K classes
    class_dropout_prob: float = 0.1  # above 0 there is a null class
    no_temporal_pos_emb: bool = False
    caption_channels: int = 512
    base_size: int = 0  # patches a side that positions are stretched to; 0: they are not
    frequency_shift: int = 0  # diffusers spaces the timestep's frequencies over one interval less: 1
    mlp_norm_eps: float = 1e-6
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    conditions = ("text",)

    def __post_init__(self):
        if self.condition not in self.conditions and not self.num_classes:
            raise UserError(f"condition={self.condition!r} is unknown; choose {', '.join(self.conditions)} or label_K")

    @property
    def num_classes(self) -> int:
        kind, _, count = self.condition.partition("_")
        return int(count) if kind == "label" and count.isdigit() else 0

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


IMAGE = dict(condition="label_1000", no_temporal_pos_emb=True)
PRESETS = {
    "DiT-XL/2": Config(),
    "DiT-XL/2x2": Config(patch_size=(2, 2, 2)),
    "DiT-XL/2-class": Config(**IMAGE),
    **{f"DiT-{s}/{p}-image": Config(patch_size=(p, p), **IMAGE, **SIZES[s]) for s in SIZES for p in (2, 4, 8)},
}
REPOSITORIES = {
    "DiT-XL/2-image": "facebook/DiT-XL-2-256/transformer"
}  # diffusers' layout; Meta serves the .pt elsewhere


def build(cfg: Config, *, rngs: nnx.Rngs) -> "DiT":
    return DiT(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    arrays = {"x": array(shape.frames, shape.height, shape.width, cfg.in_channels), "t": array()}
    return arrays | {"y": array(dtype="int32") if cfg.num_classes else array(1, cfg.caption_channels)}


class DiT(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, **kwargs)
        self.t_embedder = TimestepEmbedder(width, frequency_shift=cfg.frequency_shift, **kwargs)
        self.y_embedder = self._y_embedder(kwargs)
        self.blocks = stack(lambda r: self._block(kwargs | {"rngs": r}), cfg.depth, rngs=rngs)
        self.final_layer = AdaLNFinalLayer(width, math.prod(cfg.patch_size) * cfg.out_channels, **kwargs)

    def _block(self, kwargs):
        cfg = self.cfg
        return ConditionBlock(cfg.hidden_size, cfg.num_heads, cfg.mlp_ratio, mlp_norm_eps=cfg.mlp_norm_eps, **kwargs)

    def _y_embedder(self, kwargs):
        cfg = self.cfg
        if cfg.num_classes:
            return LabelEmbedder(cfg.num_classes, cfg.hidden_size, drop_prob=cfg.class_dropout_prob, **kwargs)
        return CaptionEmbedder(cfg.caption_channels, cfg.hidden_size, 1, **kwargs)

    def __call__(self, x, t, y=None, *, drop_text=None):
        """x [B, T, H, W, C] latents; t [B] in [0, 1000); y [B] classes or [B, 1, D] pooled text; drop_text [B] bool
        takes the null class or text. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        tokens = tap("patches", self.x_embedder(x.astype(cfg.dtype)))  # [B, T, H', W', C]
        batch, length, grid_h, grid_w, dim = tokens.shape
        tokens = tokens + grid_sincos((grid_h, grid_w), dim, base=cfg.base_size).astype(cfg.dtype)

        t_vec = tap("t_emb", self.t_embedder(t))
        condition, last = self._conditions(t_vec, y, drop_text)
        tokens = self._run(tokens.reshape(batch, length, grid_h * grid_w, dim), condition)

        out = self.final_layer(tokens, last)
        out = out.reshape(batch, -1, out.shape[-1])[:, : length * grid_h * grid_w]
        out = unpatchify(out.reshape(batch, length, grid_h, grid_w, -1), cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _conditions(self, t_vec, y, drop):
        """[B, C] for the blocks, and for the last layer."""
        if not self.cfg.num_classes:
            y = self.y_embedder(y.astype(self.cfg.dtype), drop)[:, 0]
        else:
            y = self.y_embedder(y, drop)
        condition = t_vec + tap("y_emb", y)
        return condition, condition

    def _run(self, tokens, condition):
        batch, length, space, dim = tokens.shape
        if not self.cfg.no_temporal_pos_emb:
            tokens = tokens + self._frame_positions(length)
        tokens = tokens.reshape(batch, 1, length * space, dim)  # all frames attend to each other
        tokens, visible = pad_to_shares(tokens, 2)
        tokens = tap("tokens", constrain(tokens, *STREAM))
        layer = lambda h, block: tap("out", block(h, condition, mode="full", visible=visible))
        return run_stack(layer, tokens, self.blocks, remat=self.cfg.remat)

    def _frame_positions(self, length):
        return sincos_1d(np.arange(length), self.cfg.hidden_size).astype(self.cfg.dtype)[:, None]
