"""Activations under the names that published configurations use."""

from collections.abc import Callable
from functools import partial

import jax

from opensora_jax.common.errors import UserError

gelu_tanh = partial(jax.nn.gelu, approximate=True)
gelu_erf = partial(jax.nn.gelu, approximate=False)


def quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
    "gelu": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


def activation(name: str) -> Callable:
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
