"""STDiT2, the denoiser of Open-Sora 1.1 (767M): STDiT with modulated temporal attention, RoPE and q/k norms, and
embeddings of pixel size, aspect ratio, frame count and frame rate; any size, length and condition frames in one model.

Released weights rotate before the q/k norm (`qk_norm_legacy`); later code made the order an option.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.attention import CrossAttention, SelfAttention
from opensora_jax.nn.blocks import scale_shift_table
from opensora_jax.nn.context import Sequence
from opensora_jax.nn.embeddings import CaptionEmbedder, PatchEmbed3D, SizeEmbedder, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Linear, normal, zeros
from opensora_jax.nn.mlp import MLP
from opensora_jax.nn.modulate import by_frame, drop_path, kept, modulated_mlp, table_rows
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
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 200
    qk_norm: bool = True
    qk_norm_legacy: bool = True  # RoPE before the norm
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % 3:
            raise UserError(f"stdit2: hidden_size {self.hidden_size} is no multiple of 3 (height, width, aspect ratio)")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)


PRESETS = {"STDiT2-XL/2": Config()}
REPOSITORIES = {"STDiT2-XL/2": "hpcai-tech/OpenSora-STDiT-v2-stage3"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "STDiT2":
    return STDiT2(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    return {
        "x": array(shape.frames, shape.height, shape.width, cfg.in_channels),
        "t": array(),
        "y": array(shape.text_tokens, cfg.caption_channels),
        "text_mask": array(shape.text_tokens, dtype="int32"),
        "x_mask": array(shape.frames, dtype="bool"),
        "height": array(),
        "width": array(),
        "ar": array(),
        "num_frames": array(),
        "fps": array(),
    }


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width, heads = cfg.hidden_size, cfg.num_heads
        qk = dict(qk_norm=cfg.qk_norm, norm_before_rope=not cfg.qk_norm_legacy)
        self.attn = SelfAttention(width, heads, **qk, **kwargs)
        self.attn_temp = SelfAttention(width, heads, init_out=zeros, **qk, **kwargs)
        self.cross_attn = CrossAttention(width, heads, init_out=zeros, **kwargs)
        self.mlp = MLP(width, int(width * cfg.mlp_ratio), **kwargs)
        self.scale_shift_table = scale_shift_table(6, width, cfg.param_dtype, rngs)
        self.scale_shift_table_temporal = scale_shift_table(3, width, cfg.param_dtype, rngs)

    def __call__(self, x, sequence, text, spatial, temporal, rope, keep):
        """x [B, T, S, C], as all arguments in the pieces of the sequence; spatial: modulations [B, 1 or T, 6C] of this device's frames and of all, temporal
        [B, 1 or T, 3C] of all; keep: drop-path factors [3, B] or None."""
        keep = (None, None, None) if keep is None else keep
        table = self.scale_shift_table[...]
        shift, scale, gate = table_rows(table, spatial[0])[:3]
        rows = {"pieces": sequence.pieces}
        gate = kept(gate, keep[0])
        x = sequence.by_position(self.attn(x, mode="spatial", modulation=(shift, scale), gate=gate, **rows))

        shift, scale, gate = table_rows(self.scale_shift_table_temporal[...], temporal)
        gate = kept(gate, keep[1])
        x = self.attn_temp(x, mode="temporal", rope=rope, modulation=(shift, scale), gate=gate, **rows)

        x = self.cross_attn.onto(x, **text)
        shift, scale, gate = table_rows(table, spatial[1])[3:]
        return sequence.by_frame(constrain(modulated_mlp(x, self.mlp, shift, scale, gate, keep[2]), "batch"))


class STDiT2(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, **kwargs)
        self.t_embedder = TimestepEmbedder(width, **kwargs)
        self.csize_embedder = SizeEmbedder(width // 3, **kwargs)
        self.ar_embedder = SizeEmbedder(width // 3, **kwargs)
        self.fl_embedder = SizeEmbedder(width, **kwargs)
        self.fps_embedder = SizeEmbedder(width, **kwargs)
        self.t_block = Linear(width, 6 * width, ("embed", None), init=normal(0.02), **kwargs)
        self.t_block_temp = Linear(width, 3 * width, ("embed", None), init=normal(0.02), **kwargs)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length, **kwargs)
        self.rope_freqs = Fixed(jnp.asarray(rope_frequencies(width // cfg.num_heads), cfg.param_dtype))
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.depth, rngs=rngs)
        outputs = math.prod(cfg.patch_size) * cfg.out_channels
        self.final_layer = T2IFinalLayer(width, outputs, init=zeros, **kwargs)

    def __call__(
        self, x, t, y, text_mask=None, x_mask=None, *, height, width, ar, num_frames, fps, drop_text=None, key=None
    ):
        """x [B, T, H, W, C] latents; t [B] in [0, 1000); y [B, L, D]; x_mask [B, T], True = generated frame; height,
        width, ar (height / width), num_frames and fps [B] of the video in pixels; drop_text [B] bool; key: for drop
        path. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        sequence = Sequence.of(x, cfg.patch_size)
        given = {"t": t, "y": y, "text_mask": text_mask, "all_mask": x_mask, "drop_text": drop_text}
        given |= {"size": jnp.stack([height, width], -1), "ar": ar, "num_frames": num_frames, "fps": fps}
        given["scale"] = resolution_scale(height, width, cfg.input_sq_size)
        given["keep"] = drop_path(key, cfg.drop_path, (cfg.depth, 3, x.shape[0]))
        out = sequence.run(STDiT2._share, self, (x, x_mask), given, {"scale": (), "keep": (None, None, "batch")})
        out = out.reshape(*out.shape[:2], sequence.rows, sequence.columns, out.shape[-1])
        out = unpatchify(out, cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _share(
        self, sequence, x, x_mask, *, t, y, text_mask, all_mask, drop_text, size, ar, num_frames, fps, scale, keep
    ):
        """x [B, T, H, W, C] → [B, T', S, patch outputs] of some frames (nn/context.py); all_mask: x_mask of all."""
        cfg = self.cfg
        tokens = self.x_embedder(x.astype(cfg.dtype))  # [B, T', H', W', C]
        batch, length, grid_h, grid_w, dim = tokens.shape
        base = round((grid_h * grid_w) ** 0.5)
        tokens = tokens + grid_sincos((grid_h, grid_w), dim, scale=scale, base=base).astype(cfg.dtype)
        tokens = tap("tokens", constrain(tokens.reshape(batch, length, grid_h * grid_w, dim), "batch"))

        size = jnp.concatenate([self.csize_embedder(size), self.ar_embedder(ar)], -1)
        pace = self.fl_embedder(num_frames) + self.fps_embedder(fps)
        t_vec = tap("t_emb", self.t_embedder(t))
        zero_vec = self.t_embedder(jnp.zeros_like(t)) if x_mask is not None else t_vec
        some, whole = self._modulation("t_block", t_vec + size, zero_vec + size, x_mask, all_mask)
        spatial = sequence.of_some(some), sequence.of_all(whole)
        _, temporal = self._modulation("t_block_temp", t_vec + pace, zero_vec + pace, x_mask, all_mask)
        temporal = sequence.of_all(temporal)
        text = {"y": tap("y_emb", self.y_embedder(y.astype(cfg.dtype), drop_text)), "text_mask": text_mask}
        rope = rope_table(jnp.arange(sequence.frames), self.rope_freqs[...])

        def layer(h, entry):
            block, keep = entry
            return tap("out", block(h, sequence, text, spatial, temporal, rope, keep))

        layers = (self.blocks, sequence.of_layers(keep))
        tokens = sequence.join(run_stack(layer, sequence.cut(tokens), layers, remat=cfg.remat))
        # As released: generated frames see the bare timestep, condition frames timestep zero and the size.
        return self.final_layer(tokens, t_vec, x_mask, zero_vec + size)

    def _modulation(self, name, generated, condition, *masks):
        """Of the frames of each mask."""
        project = lambda vector: getattr(self, name)(jax.nn.silu(vector))
        generated, condition = tap(f"{name}_out", project(generated)), project(condition)
        return [by_frame(generated, condition, mask) for mask in masks]
