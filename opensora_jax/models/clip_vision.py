"""CLIP's image transformer (Radford et al. 2021, arXiv 2103.00020): a ViT with a class token, projected into the space
that it shares with captions. Its text half is text/clip.py; both together make the CLIP score."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.clip_block import ClipBlock
from opensora_jax.nn.linear import Conv, Embed, Linear, normal
from opensora_jax.nn.norms import LayerNorm
from opensora_jax.nn.stack import run_stack, stack

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels in [0, 1]


@dataclass(frozen=True)
class Config:
    image_size: int = 224
    patch_size: int = 32
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"


PRESETS = {
    "clip-vit-base-patch32": Config(),
    "clip-vit-large-patch14": Config(
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        projection_dim=768,
    ),
}
REPOSITORIES = {name: f"openai/{name}" for name in PRESETS}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "CLIPVision":
    return CLIPVision(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    return {"x": jax.ShapeDtypeStruct((shape.batch, cfg.image_size, cfg.image_size, 3), "float32")}


class CLIPVision(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, width = cfg, cfg.hidden_size
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        norm = lambda: LayerNorm(width, eps=cfg.layer_norm_eps, param_dtype=cfg.param_dtype)
        patch = (cfg.patch_size, cfg.patch_size)
        self.patches = Conv(3, width, patch, strides=patch, bias=False, init=normal(0.02), **kwargs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (width,), cfg.param_dtype) * width**-0.5)
        self.positions = Embed((cfg.image_size // cfg.patch_size) ** 2 + 1, width, init=normal(0.02), **kwargs)
        self.norm_in = norm()
        self.blocks = stack(lambda r: ClipBlock(cfg, causal=False, rngs=r), cfg.num_hidden_layers, rngs=rngs)
        self.norm_out = norm()
        self.projection = Linear(width, cfg.projection_dim, ("embed", None), bias=False, **kwargs)

    def __call__(self, x):
        """x [B, H, W, 3] in [0, 1], of the config's size → features [B, projection_dim] float32."""
        x = ((x - jnp.asarray(MEAN)) / jnp.asarray(STD)).astype(self.cfg.dtype)
        tokens = self.patches(x).reshape(x.shape[0], -1, self.cfg.hidden_size)
        first = jnp.broadcast_to(self.class_token[...].astype(tokens.dtype), (x.shape[0], 1, tokens.shape[-1]))
        tokens = jnp.concatenate([first, tokens], 1)
        tokens = self.norm_in(tokens + self.positions(jnp.arange(tokens.shape[1])))
        tokens = run_stack(lambda h, block: block(h), tokens, self.blocks, remat=self.cfg.remat)
        return self.projection(self.norm_out(tokens[:, 0])).astype(jnp.float32)
