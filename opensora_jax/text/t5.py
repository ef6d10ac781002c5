"""The encoder of T5 (Raffel et al. 2019, arXiv 1910.10683; v1.1 as in Open-Sora): RMS norms, relative position bias
shared by all layers, no scaling of attention logits.

Open-Sora 1.x passes the mask of the caption; 2.0 passes none and attends to padding.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.attention import attention
from opensora_jax.nn.activations import activation
from opensora_jax.nn.linear import Embed, Linear, normal
from opensora_jax.nn.norms import RMSNorm
from opensora_jax.nn.params import partition
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap


@dataclass(frozen=True)
class Config:
    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "gated-gelu"  # or "relu", "gated-silu", ...
    layer_norm_epsilon: float = 1e-6
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def act(self) -> str:
        # The published name gated-gelu means the tanh approximation.
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name


PRESETS = {
    "t5-v1_1-xxl": Config(),
    "t5-v1_1-xl": Config(d_model=2048, d_ff=5120, num_heads=32),
    "t5-v1_1-large": Config(d_model=1024, d_ff=2816, num_heads=16),
    "t5-v1_1-base": Config(d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "t5-v1_1-small": Config(d_model=512, d_ff=1024, num_layers=8, num_heads=6),
}
REPOSITORIES = {name: f"google/{name}" for name in PRESETS} | {"t5-v1_1-xxl": "DeepFloyd/t5-v1_1-xxl"}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "T5Encoder":
    return T5Encoder(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((shape.batch, shape.text_tokens), "int32")
    return {"ids": tokens, "mask": tokens}


class T5Encoder(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.shared = Embed(
            cfg.vocab_size, cfg.d_model, init=normal(1.0), dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs
        )
        buckets = partition(normal(cfg.d_model**-0.5), None, "heads")
        self.relative_bias = nnx.Param(
            buckets(rngs.params(), (cfg.relative_attention_num_buckets, cfg.num_heads), jnp.dtype(cfg.param_dtype))
        )
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.num_layers, rngs=rngs)
        self.final_norm = RMSNorm(cfg.d_model, eps=cfg.layer_norm_epsilon, param_dtype=cfg.param_dtype)

    def __call__(self, ids, mask=None):
        """ids [B, L] int; mask [B, L], 1 = keep, or None to attend to everything. Returns [B, L, D] float32."""
        bias = self._bias(ids.shape[1])
        mask = None if mask is None else mask.astype(bool)
        x = tap("embed", self.shared(ids))
        body = lambda x, block: tap("block", block(x, bias, mask))
        x = run_stack(body, x, self.blocks, remat=self.cfg.remat)
        return self.final_norm(x).astype(jnp.float32)

    def _bias(self, length):
        """[1, heads, L, L] from the signed distance of key and query."""
        distance = np.arange(length)[None, :] - np.arange(length)[:, None]
        cfg = self.cfg
        buckets = relative_buckets(distance, cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance)
        return jnp.moveaxis(self.relative_bias[...][buckets], -1, 0)[None]


def relative_buckets(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Half of the buckets look back, half ahead; near distances have their own, far ones share logarithmically."""
    half = buckets // 2
    exact = half // 2
    far = np.abs(distance)
    with np.errstate(divide="ignore"):
        # float32, as the bucket borders of the published models were computed
        ratio = np.log(far.astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    log_bucket = exact + np.where(far < exact, 0, ratio * (half - exact)).astype(np.int32)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, np.minimum(log_bucket, half - 1))


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs):
        inner = cfg.num_heads * cfg.d_kv
        linear = partial(Linear, bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        norm = partial(RMSNorm, cfg.d_model, eps=cfg.layer_norm_epsilon, param_dtype=cfg.param_dtype)
        self.heads = cfg.num_heads
        self.act = activation(cfg.act)
        self.norm1, self.norm2 = norm(), norm()
        # Scales of Mesh TensorFlow: without 1/sqrt(d) in attention, queries begin small.
        wide = normal(cfg.d_model**-0.5)
        self.q = linear(cfg.d_model, inner, ("embed", "heads"), init=normal((cfg.d_model * cfg.d_kv) ** -0.5))
        self.k = linear(cfg.d_model, inner, ("embed", "heads"), init=wide)
        self.v = linear(cfg.d_model, inner, ("embed", "heads"), init=wide)
        self.o = linear(inner, cfg.d_model, ("heads", "embed"), init=normal(inner**-0.5))
        self.gated = cfg.gated
        for name in ("gate", "up") if cfg.gated else ("wi",):
            setattr(self, name, linear(cfg.d_model, cfg.d_ff, ("embed", "mlp"), init=wide))
        self.wo = linear(cfg.d_ff, cfg.d_model, ("mlp", "embed"), init=normal(cfg.d_ff**-0.5))

    def __call__(self, x, bias, mask):
        split = lambda a: a.reshape(*a.shape[:-1], self.heads, -1)
        h = self.norm1(x)
        h = attention(split(self.q(h)), split(self.k(h)), split(self.v(h)), kv_mask=mask, bias=bias, scale=1.0)
        x = x + self.o(h.reshape(*x.shape[:-1], -1))
        h = self.norm2(x)
        h = self.act(self.gate(h)) * self.up(h) if self.gated else self.act(self.wi(h))
        return x + self.wo(h)
