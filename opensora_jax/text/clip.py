"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020): causal, pre-norm, pooled at the end of the text.

Open-Sora 2.0 conditions on the pooled output of ViT-L/14, 1.0's class of models on that of ViT-B/32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.clip_block import ClipBlock
from opensora_jax.nn.linear import Embed, Linear, normal
from opensora_jax.nn.norms import LayerNorm
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap


@dataclass(frozen=True)
class Config:
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2  # OpenAI's files say 2, which means: the largest id of the text
    projection_dim: int | None = None  # of the pooled output into the space shared with images
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"


PRESETS = {
    "clip-vit-large-patch14": Config(),
    "clip-vit-base-patch32": Config(hidden_size=512, intermediate_size=2048, num_attention_heads=8),
}
REPOSITORIES = {name: f"openai/{name}" for name in PRESETS}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "CLIPText":
    return CLIPText(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((shape.batch, min(shape.text_tokens, cfg.max_position_embeddings)), "int32")
    return {"ids": tokens, "mask": tokens}


class TextFeatures(NamedTuple):
    """What the text says, float32."""

    tokens: jax.Array  # [B, L, D], after the last norm
    pooled: jax.Array  # [B, D], the row of the end of the text
    projected: jax.Array | None  # [B, projection_dim]


class CLIPText(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        self.tokens = Embed(cfg.vocab_size, width, init=normal(0.02), **kwargs)
        self.positions = Embed(cfg.max_position_embeddings, width, init=normal(0.02), **kwargs)
        self.blocks = stack(lambda r: ClipBlock(cfg, causal=True, rngs=r), cfg.num_hidden_layers, rngs=rngs)
        self.final_norm = LayerNorm(width, eps=cfg.layer_norm_eps, param_dtype=cfg.param_dtype)
        self.projection = (
            Linear(width, cfg.projection_dim, ("embed", None), bias=False, init=normal(width**-0.5), **kwargs)
            if cfg.projection_dim
            else None
        )

    def __call__(self, ids, mask=None) -> TextFeatures:
        """ids [B, L] int, L at most 77; mask [B, L], 1 = keep (Open-Sora passes none: padding is end-of-text)."""
        mask = None if mask is None else mask.astype(bool)
        x = tap("embeddings", self.tokens(ids) + self.positions(jnp.arange(ids.shape[1])))
        x = run_stack(lambda x, block: tap("layer", block(x, mask)), x, self.blocks, remat=self.cfg.remat)
        x = self.final_norm(x)
        eos = self.cfg.eos_token_id
        end = jnp.argmax(ids if eos == 2 else ids == eos, axis=1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        projected = None if self.projection is None else self.projection(pooled).astype(jnp.float32)
        return TextFeatures(x.astype(jnp.float32), pooled.astype(jnp.float32), projected)
