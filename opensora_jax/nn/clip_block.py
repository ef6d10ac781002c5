"""The pre-norm transformer block of CLIP's two towers."""

from functools import partial

from flax import nnx

from opensora_jax.kernels.attention import attention
from opensora_jax.nn.activations import activation
from opensora_jax.nn.linear import Linear, normal
from opensora_jax.nn.mlp import MLP
from opensora_jax.nn.norms import LayerNorm


class ClipBlock(nnx.Module):
    """cfg: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps, dtypes."""

    def __init__(self, cfg, *, causal: bool, rngs):
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width, depth = cfg.hidden_size, cfg.num_hidden_layers
        self.heads, self.causal = cfg.num_attention_heads, causal
        norm = partial(LayerNorm, width, eps=cfg.layer_norm_eps, param_dtype=cfg.param_dtype)
        self.norm1, self.norm2 = norm(), norm()
        into = partial(Linear, width, width, ("embed", "heads"), init=normal((2 * depth * width) ** -0.5), **kwargs)
        self.q, self.k, self.v = into(), into(), into()
        self.o = Linear(width, width, ("heads", "embed"), init=normal(width**-0.5), **kwargs)
        self.mlp = MLP(
            width, cfg.intermediate_size, act=activation(cfg.hidden_act), init=normal((2 * width) ** -0.5),
            init_out=normal((2 * depth * width) ** -0.5), **kwargs,
        )  # fmt: skip

    def __call__(self, x, mask=None):
        """x [B, N, C]; mask [B, N] bool, True = visible."""
        split = lambda a: a.reshape(*a.shape[:-1], self.heads, -1)
        h = self.norm1(x)
        h = attention(split(self.q(h)), split(self.k(h)), split(self.v(h)), kv_mask=mask, causal=self.causal)
        x = x + self.o(h.reshape(x.shape))
        return x + self.mlp(self.norm2(x))
