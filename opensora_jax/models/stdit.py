"""STDiT, the denoiser of Open-Sora 1.0 (759M): one block holds spatial attention, temporal attention, cross-attention
and MLP. Temporal attention looks at the bare residual stream and shares the spatial gate. 1.1 added x_mask.

Position tables depend only on the patch index, so one network serves every latent size; 1.0's `input_size` has no
counterpart here.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.attention import CrossAttention, SelfAttention
from opensora_jax.nn.blocks import scale_shift_table
from opensora_jax.nn.context import Sequence
from opensora_jax.nn.embeddings import CaptionEmbedder, PatchEmbed3D, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Linear, normal, zeros
from opensora_jax.nn.mlp import MLP
from opensora_jax.nn.modulate import by_frame, drop_path, kept, modulated_mlp, table_rows
from opensora_jax.nn.positions import grid_sincos, sincos_1d
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain


@dataclass(frozen=True)
class Config:
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 120
    space_scale: float = 1.0  # position = patch index / scale: 0.5 runs 256 px on a grid learnt at 512 px
    time_scale: float = 1.0
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)


PRESETS = {
    "STDiT-XL/2": Config(),
    "STDiT-XL/2-16x256x256": Config(space_scale=0.5),
    "STDiT-XL/2-16x512x512": Config(),
    "STDiT-XL/2-64x512x512": Config(time_scale=2 / 3),
}
REPOSITORIES = {
    "STDiT-XL/2-16x256x256": "hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x256x256.pth",
    "STDiT-XL/2-16x512x512": "hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x512x512.pth",
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "STDiT":
    return STDiT(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    return {
        "x": array(shape.frames, shape.height, shape.width, cfg.in_channels),
        "t": array(),
        "y": array(shape.text_tokens, cfg.caption_channels),
        "text_mask": array(shape.text_tokens, dtype="int32"),
        "x_mask": array(shape.frames, dtype="bool"),
    }


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width, heads = cfg.hidden_size, cfg.num_heads
        self.attn = SelfAttention(width, heads, **kwargs)
        self.attn_temp = SelfAttention(width, heads, init_out=zeros, **kwargs)
        self.cross_attn = CrossAttention(width, heads, init_out=zeros, **kwargs)
        self.mlp = MLP(width, int(width * cfg.mlp_ratio), **kwargs)
        self.scale_shift_table = scale_shift_table(6, width, cfg.param_dtype, rngs)

    def __call__(self, x, sequence, text, modulation, unmasked, frame_positions, keep):
        """x [B, T, S, C], as all arguments in the pieces of the sequence; modulation [B, 1 or T, 6C] of this device's
        frames and of all, unmasked [B, 1, 6C] the same as if no frame were a condition; frame_positions [1 or B, T, 1,
        C]: zeros but in the first block; keep: drop-path factors [3, B] or None."""
        keep = (None, None, None) if keep is None else keep
        table = self.scale_shift_table[...]
        rows = {"pieces": sequence.pieces}
        shift, scale, gate = table_rows(table, modulation[0])[:3]
        gate = kept(gate, keep[0])
        x = sequence.by_position(self.attn(x, mode="spatial", modulation=(shift, scale), gate=gate, **rows))

        # As released: no norm, no modulation, and the spatial gate of the sampled timestep, also on condition frames.
        gate = kept(table_rows(table, unmasked)[2], keep[1])
        x = self.attn_temp(x, mode="temporal", modulation=(frame_positions, None), gate=gate, **rows)

        x = self.cross_attn.onto(x, **text)
        shift, scale, gate = table_rows(table, modulation[1])[3:]
        return sequence.by_frame(constrain(modulated_mlp(x, self.mlp, shift, scale, gate, keep[2]), "batch"))


class STDiT(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, width, **kwargs)
        self.t_embedder = TimestepEmbedder(width, **kwargs)
        self.t_block = Linear(width, 6 * width, ("embed", None), init=normal(0.02), **kwargs)
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, width, cfg.model_max_length, **kwargs)
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.depth, rngs=rngs)
        outputs = math.prod(cfg.patch_size) * cfg.out_channels
        self.final_layer = T2IFinalLayer(width, outputs, init=zeros, **kwargs)

    def __call__(self, x, t, y, text_mask=None, x_mask=None, *, drop_text=None, key=None):
        """x [B, T, H, W, C] latents; t [B] in [0, 1000); y [B, L, D]; x_mask [B, T], True = generated frame;
        drop_text [B] bool; key: for drop path. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        frames, rows, columns = x.shape[1:4]
        sequence = Sequence.of(x, cfg.patch_size)
        given = {"t": t, "y": y, "text_mask": text_mask, "all_mask": x_mask, "drop_text": drop_text}
        given["keep"] = drop_path(key, cfg.drop_path, (cfg.depth, 3, x.shape[0]))
        out = sequence.run(STDiT._share, self, (x, x_mask), given, {"keep": (None, None, "batch")})
        out = out.reshape(*out.shape[:2], sequence.rows, sequence.columns, out.shape[-1])
        out = unpatchify(out, cfg.patch_size, cfg.out_channels)
        return out[:, :frames, :rows, :columns].astype(jnp.float32)

    def _share(self, sequence, x, x_mask, *, t, y, text_mask, all_mask, drop_text, keep):
        """x [B, T, H, W, C] → [B, T', S, patch outputs] of some frames (nn/context.py); all_mask: x_mask of all."""
        cfg = self.cfg
        tokens = self.x_embedder(x.astype(cfg.dtype))  # [B, T', H', W', C]
        batch, length, grid_h, grid_w, dim = tokens.shape
        tokens = tokens + grid_sincos((grid_h, grid_w), dim, scale=cfg.space_scale).astype(cfg.dtype)
        tokens = tap("tokens", constrain(tokens.reshape(batch, length, grid_h * grid_w, dim), "batch"))

        t_vec = tap("t_emb", self.t_embedder(t))
        unmasked = tap("t_block_out", self.t_block(jax.nn.silu(t_vec)))
        zero_vec = self.t_embedder(jnp.zeros_like(t)) if x_mask is not None else t_vec
        condition = self.t_block(jax.nn.silu(zero_vec))
        modulation = [sequence.of_some(by_frame(unmasked, condition, x_mask))]
        modulation.append(sequence.of_all(by_frame(unmasked, condition, all_mask)))
        unmasked = sequence.of_some(unmasked[:, None])
        text = {"y": tap("y_emb", self.y_embedder(y.astype(cfg.dtype), drop_text)), "text_mask": text_mask}

        positions = sincos_1d(np.arange(sequence.frames) / cfg.time_scale, dim).astype(cfg.dtype)[None, :, None]
        if sequence.pieces > 1:
            positions = sequence.of_all(jnp.broadcast_to(positions, (batch, *positions.shape[1:])))
        first = jnp.arange(cfg.depth) == 0

        def layer(h, entry):
            block, is_first, keep = entry
            return tap("out", block(h, sequence, text, modulation, unmasked, positions * is_first, keep))

        keep = sequence.of_layers(keep)
        tokens = run_stack(layer, sequence.cut(tokens), (self.blocks, first, keep), remat=cfg.remat)
        return self.final_layer(sequence.join(tokens), t_vec, x_mask, zero_vec)
