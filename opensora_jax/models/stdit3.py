"""STDiT3, the denoiser of Open-Sora 1.2 (1.1B): alternating spatial and temporal blocks, each with its own
cross-attention and MLP; q/k norm then RoPE in temporal attention; timestep and fps through one adaLN-single.

Open-Sora 1.3's variant (window attention, condition embedders) is models/stdit3_v13.py.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.attention import CrossAttention, SelfAttention
from opensora_jax.nn.embeddings import CaptionEmbedder, PatchEmbed3D, SizeEmbedder, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Linear, normal, xavier, zeros
from opensora_jax.nn.mlp import MLP
from opensora_jax.nn.modulate import by_frame, modulate, table_rows
from opensora_jax.nn.norms import LayerNorm
from opensora_jax.nn.params import Fixed
from opensora_jax.nn.positions import rope_frequencies, rope_table, sincos_2d
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain


@dataclass(frozen=True)
class Config:
    input_sq_size: int = 512  # the square size at which position embeddings have unit scale
    in_channels: int = 4
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
    qk_norm_legacy: bool = False  # RoPE before the norm, as Open-Sora 1.1 did
    skip_y_embedder: bool = False  # captions arrive projected to hidden_size
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)


PRESETS = {
    "STDiT3-XL/2": Config(),
    "STDiT3-3B/2": Config(hidden_size=1872, num_heads=26),
}
REPOSITORIES = {"STDiT3-XL/2": "hpcai-tech/OpenSora-STDiT-v3"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "STDiT3":
    return STDiT3(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    width = cfg.hidden_size if cfg.skip_y_embedder else cfg.caption_channels
    return {
        "x": array(shape.frames, shape.height, shape.width, cfg.in_channels),
        "t": array(),
        "y": array(shape.text_tokens, width),
        "text_mask": array(shape.text_tokens, dtype="int32"),
        "x_mask": array(shape.frames, dtype="bool"),
        "fps": array(),
        "height": array(),
        "width": array(),
    }


class Block(nnx.Module):
    """Attention (spatial or temporal), cross-attention, MLP, gated by the timestep."""

    def __init__(self, cfg: Config, mode: str, *, rngs: nnx.Rngs):
        self.mode = mode
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        out = zeros if mode == "temporal" else None  # temporal layers begin as the identity
        self.attn = SelfAttention(
            width, cfg.num_heads, qk_norm=cfg.qk_norm, norm_before_rope=not cfg.qk_norm_legacy, init_out=out, **kwargs
        )
        self.cross_attn = CrossAttention(width, cfg.num_heads, init_out=out, **kwargs)
        self.mlp = MLP(width, int(width * cfg.mlp_ratio), init_out=out, **kwargs)
        self.norm1 = LayerNorm(width, affine=False)
        self.norm2 = LayerNorm(width, affine=False)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (6, width), cfg.param_dtype) / width**0.5)

    def __call__(self, x, text, text_mask, modulation, rope, keep):
        """x [B, T, S, C]; modulation [B, 1 or T, 6C]; keep: drop-path factors [2, B] or None."""
        rows = table_rows(self.scale_shift_table[...], modulation)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows
        axes = ("batch", "frames", None, None) if self.mode == "spatial" else ("batch", None, "space", None)

        h = constrain(modulate(self.norm1(x), shift_msa, scale_msa), *axes)
        h = self.attn(h, mode=self.mode, rope=rope if self.mode == "temporal" else None)
        x = x + _gated(constrain(h, "batch", "frames", "space", None), gate_msa, keep, 0)

        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.cross_attn(flat, text, text_mask).reshape(x.shape)
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return constrain(x + _gated(h, gate_mlp, keep, 1), "batch", "frames", "space", None)


class STDiT3(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, **kwargs)
        self.t_embedder = TimestepEmbedder(width, init=xavier, **kwargs)
        self.fps_embedder = SizeEmbedder(width, init=normal(0.02), init_out=zeros, **kwargs)
        self.t_block = Linear(width, 6 * width, ("embed", None), **kwargs)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length, init=xavier, **kwargs)
        self.spatial_blocks = stack(lambda r: Block(cfg, "spatial", rngs=r), cfg.depth, rngs=rngs)
        self.temporal_blocks = stack(lambda r: Block(cfg, "temporal", rngs=r), cfg.depth, rngs=rngs)
        self.rope_freqs = Fixed(jnp.asarray(rope_frequencies(width // cfg.num_heads), cfg.param_dtype))
        patch_volume = math.prod(cfg.patch_size)
        self.final_layer = T2IFinalLayer(width, patch_volume * cfg.out_channels, **kwargs)

    def __call__(self, x, t, y, text_mask=None, x_mask=None, *, fps, height, width, drop_text=None, key=None):
        """x [B, T, H, W, C] latents; t [B] in [0, 1000]; y [B, L, D]; x_mask [B, T], True = generated frame;
        height and width in pixels [B]; drop_text [B] bool; key: for drop path. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        tokens = self.x_embedder(x.astype(cfg.dtype))  # [B, T, H', W', C]
        tokens = tokens + self._positions(tokens.shape[2:4], height, width).astype(cfg.dtype)
        batch, _, grid_h, grid_w, _ = tokens.shape
        tokens = tokens.reshape(batch, tokens.shape[1], grid_h * grid_w, -1)
        tokens = tap("tokens", constrain(tokens, "batch", "frames", "space", None))

        fps = tap("fps_emb", self.fps_embedder(fps))
        t_vec = tap("t_emb", self.t_embedder(t)) + fps
        condition_vec = self.t_embedder(jnp.zeros_like(t)) + fps if x_mask is not None else t_vec
        modulation = by_frame(
            tap("t_block_out", self.t_block(jax.nn.silu(t_vec))), self.t_block(jax.nn.silu(condition_vec)), x_mask
        )
        text = y.astype(cfg.dtype) if cfg.skip_y_embedder else self.y_embedder(y.astype(cfg.dtype), drop_text)
        text = tap("y_emb", text)

        rope = rope_table(jnp.arange(tokens.shape[1]), self.rope_freqs[...])

        def pair(h, layers):
            spatial, temporal, keep = layers
            h = tap("spatial_out", spatial(h, text, text_mask, modulation, rope, keep and keep[0]))
            return tap("temporal_out", temporal(h, text, text_mask, modulation, rope, keep and keep[1]))

        layers = (self.spatial_blocks, self.temporal_blocks, self._keep(key, batch))
        tokens = run_stack(pair, tokens, layers, remat=cfg.remat)

        out = self.final_layer(tokens, t_vec, x_mask, condition_vec)
        out = unpatchify(out.reshape(batch, -1, grid_h, grid_w, out.shape[-1]), cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _positions(self, grid, height, width):
        """The scale is that of the first sample: a batch is one bucket, so it is everybody's."""
        scale = jnp.sqrt(height[0].astype(jnp.float32) * width[0].astype(jnp.float32)) / self.cfg.input_sq_size
        base = round((grid[0] * grid[1]) ** 0.5)
        h, w = (jnp.arange(size, dtype=jnp.float32) / scale * (base / size) for size in grid)
        return sincos_2d(h, w, self.cfg.hidden_size)

    def _keep(self, key, batch):
        """Drop-path factors [depth, 2 kinds, 2 branches, B], rates rising linearly with depth; None when unused."""
        cfg = self.cfg
        if key is None or cfg.drop_path == 0:
            return None
        rates = jnp.linspace(0, cfg.drop_path, cfg.depth)[:, None, None, None]
        kept = jax.random.bernoulli(key, 1 - rates, (cfg.depth, 2, 2, batch))
        return tuple(jnp.moveaxis(kept / (1 - rates), 1, 0))


def _gated(h, gate, keep, branch):
    h = (h.astype(jnp.float32) * gate).astype(h.dtype)
    return h if keep is None else h * keep[branch][:, None, None, None].astype(h.dtype)
