"""The two-layer perceptron of every transformer block."""

from functools import partial

import jax
from flax import nnx

from opensora_jax.nn.linear import Linear, xavier

gelu_tanh = partial(jax.nn.gelu, approximate=True)
gelu_erf = partial(jax.nn.gelu, approximate=False)


class MLP(nnx.Module):
    """fc1, activation, fc2 (timm's names, which the released checkpoints carry)."""

    def __init__(
        self, features, hidden, outputs=None, *, act=gelu_tanh, init=xavier, init_out=None, dtype, param_dtype, rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.act = act
        self.fc1 = Linear(features, hidden, ("embed", "mlp"), init=init, **kwargs)
        self.fc2 = Linear(hidden, outputs or features, ("mlp_rows", "embed"), init=init_out or init, **kwargs)

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))
