"""Linear, convolution and embedding layers: nnx layers with logical axes and one dtype policy.

Parameters live in `param_dtype` (float32), matmuls run in `dtype`; PyTorch's Linear(out, in) becomes kernel [in, out],
its Conv (O, I, ...) becomes kernel [..., I, O].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.kernels.spec import platform
from opensora_jax.nn.params import partition
from opensora_jax.parallel import shard

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
            conv_general_dilated=_conv3d if len(kernel) == 3 and groups == 1 else jax.lax.conv_general_dilated,
            rngs=rngs,
        )


def _conv3d(x, kernel, strides, padding, **kwargs):
    """XLA's convolution; on a CPU, where it is fast in two dimensions only, the kernel's frames become input channels
    of a 2-D one (1.3 to 5 times faster with gradients). Where the picture is cut over devices XLA's own stays, whose
    partitioning is what accelerators run."""
    dilations = (*(kwargs["lhs_dilation"] or ()), *(kwargs["rhs_dilation"] or ()))
    where = shard.current()
    cut = where is not None and where.axes_of("space")
    if platform() != "cpu" or cut or isinstance(padding, str) or any(d != 1 for d in dilations):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    x = jnp.pad(x, [(0, 0), padding[0], (0, 0), (0, 0), (0, 0)])
    taps, stride = kernel.shape[0], strides[0]
    frames = (x.shape[1] - taps) // stride + 1
    x = jnp.concatenate([x[:, t : t + stride * (frames - 1) + 1 : stride] for t in range(taps)], -1)
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]), kernel, strides[1:], padding[1:], dimension_numbers=layout,
        precision=kwargs["precision"],
    )  # fmt: skip
    return y.reshape(-1, frames, *y.shape[1:])


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
