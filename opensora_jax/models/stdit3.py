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
from opensora_jax.nn.attention import SelfAttention
from opensora_jax.nn.blocks import TextBlock
from opensora_jax.nn.context import Sequence
from opensora_jax.nn.embeddings import CaptionEmbedder, PatchEmbed3D, SizeEmbedder, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Linear, normal, xavier, zeros
from opensora_jax.nn.modulate import by_frame, drop_path
from opensora_jax.nn.params import Fixed
from opensora_jax.nn.positions import grid_sincos, resolution_scale, rope_frequencies, rope_table
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


def block(cfg: Config, mode: str, rngs: nnx.Rngs) -> TextBlock:
    kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
    width, heads = cfg.hidden_size, cfg.num_heads
    out = zeros if mode == "temporal" else None  # temporal layers begin as the identity
    attn = SelfAttention(width, heads, qk_norm=cfg.qk_norm, init_out=out, **kwargs)
    return TextBlock(attn, width, heads, cfg.mlp_ratio, init_cross=out, init_mlp=out, **kwargs)


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
        self.spatial_blocks = stack(lambda r: block(cfg, "spatial", r), cfg.depth, rngs=rngs)
        self.temporal_blocks = stack(lambda r: block(cfg, "temporal", r), cfg.depth, rngs=rngs)
        self.rope_freqs = Fixed(jnp.asarray(rope_frequencies(width // cfg.num_heads), cfg.param_dtype))
        patch_volume = math.prod(cfg.patch_size)
        self.final_layer = T2IFinalLayer(width, patch_volume * cfg.out_channels, **kwargs)

    def __call__(self, x, t, y, text_mask=None, x_mask=None, *, fps, height, width, drop_text=None, key=None):
        """x [B, T, H, W, C] latents; t [B] in [0, 1000]; y [B, L, D]; x_mask [B, T], True = generated frame;
        height and width in pixels [B]; drop_text [B] bool; key: for drop path. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        sequence = Sequence.of(x, cfg.patch_size)
        given = {"t": t, "y": y, "text_mask": text_mask, "all_mask": x_mask, "fps": fps, "drop_text": drop_text}
        given["scale"] = resolution_scale(height, width, cfg.input_sq_size)
        given["keep"] = drop_path(key, cfg.drop_path, (cfg.depth, 4, x.shape[0]))
        out = sequence.run(STDiT3._share, self, (x, x_mask), given, {"scale": (), "keep": (None, None, "batch")})
        out = out.reshape(*out.shape[:2], sequence.rows, sequence.columns, out.shape[-1])
        out = unpatchify(out, cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _share(self, sequence, x, x_mask, *, t, y, text_mask, all_mask, fps, drop_text, scale, keep):
        """x [B, T, H, W, C] → [B, T', S, patch outputs] of some frames (nn/context.py); all_mask: x_mask of all."""
        cfg = self.cfg
        tokens = self.x_embedder(x.astype(cfg.dtype))  # [B, T', H', W', C]
        batch, length, grid_h, grid_w, dim = tokens.shape
        base = round((grid_h * grid_w) ** 0.5)
        tokens = tokens + grid_sincos((grid_h, grid_w), dim, scale=scale, base=base).astype(cfg.dtype)
        tokens = tap("tokens", constrain(tokens.reshape(batch, length, grid_h * grid_w, dim), "batch"))

        fps = tap("fps_emb", self.fps_embedder(fps))
        t_vec = tap("t_emb", self.t_embedder(t)) + fps
        condition_vec = self.t_embedder(jnp.zeros_like(t)) + fps if x_mask is not None else t_vec
        generated = tap("t_block_out", self.t_block(jax.nn.silu(t_vec)))
        condition = self.t_block(jax.nn.silu(condition_vec))
        modulation = {"spatial": sequence.of_some(by_frame(generated, condition, x_mask))}
        modulation["temporal"] = sequence.of_all(by_frame(generated, condition, all_mask))
        embedded = y.astype(cfg.dtype) if cfg.skip_y_embedder else self.y_embedder(y.astype(cfg.dtype), drop_text)
        text = {"y": tap("y_emb", embedded), "text_mask": text_mask}

        rope = rope_table(jnp.arange(sequence.frames), self.rope_freqs[...])
        spatially = lambda attn, h: attn(h, mode="spatial", pieces=sequence.pieces)
        temporally = lambda attn, h: attn(h, mode="temporal", rope=rope, pieces=sequence.pieces)

        def pair(h, layers):
            spatial, temporal, keep = layers
            keep = (None, None) if keep is None else (keep[:2], keep[2:])
            h = tap("spatial_out", spatial(h, spatially, text, modulation["spatial"], keep=keep[0]))
            h = sequence.by_position(h)
            h = temporal(h, temporally, text, modulation["temporal"], mode="temporal", keep=keep[1])
            return tap("temporal_out", sequence.by_frame(h))

        layers = (self.spatial_blocks, self.temporal_blocks, sequence.of_layers(keep))
        tokens = sequence.join(run_stack(pair, sequence.cut(tokens), layers, remat=cfg.remat))
        return self.final_layer(tokens, t_vec, x_mask, condition_vec)
