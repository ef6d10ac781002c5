"""Linear, convolution and embedding layers: nnx layers with logical axes and one dtype policy.

Parameters live in `param_dtype` (float32), matmuls run in `dtype`; PyTorch's Linear(out, in) becomes kernel [in, out],
its Conv (O, I, ...) becomes kernel [..., I, O].
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from opensora_jax.nn.params import partition

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()
normal = nnx.initializers.normal
lecun = nnx.initializers.lecun_normal()
fan_in_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # ±1/sqrt(inputs), PyTorch's default


class Linear(nnx.Linear):
    """axes: logical names of (input, output), e.g. ("embed", "mlp")."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None] = (None, None),
        *,
        bias: bool = True,
        init=xavier,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            inputs,
            outputs,
            use_bias=bias,
            kernel_init=partition(init, *axes),
            bias_init=zeros,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            rngs=rngs,
        )


class Conv(nnx.Conv):
    """A convolution of any rank over [B, *space, C]; padding "VALID" unless pairs are given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        *,
        strides: Sequence[int] | int = 1,
        padding="VALID",
        groups: int = 1,
        bias: bool = True,
        init=lecun,
        axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            inputs,
            outputs,
            kernel_size=tuple(kernel),
            strides=strides,
            padding=padding,
            feature_group_count=groups,
            use_bias=bias,
            kernel_init=partition(init, *([None] * len(kernel)), *axes),
            bias_init=zeros,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            rngs=rngs,
        )


class Embed(nnx.Embed):
    """A table [entries, features]."""

    def __init__(self, entries: int, features: int, *, init=None, dtype=jnp.float32, param_dtype=jnp.float32, rngs):
        super().__init__(
            entries,
            features,
            embedding_init=partition(init or normal(0.02), "vocab", "embed"),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            rngs=rngs,
        )
