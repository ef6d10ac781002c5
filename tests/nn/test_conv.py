"""Convolutions against XLA's own, forward and gradients."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from opensora_jax.kernels import spec
from opensora_jax.nn.linear import Conv


@pytest.mark.parametrize(
    "kernel, strides, padding",
    [((3, 3, 3), 1, [(2, 0), (1, 1), (1, 1)]), ((3, 3, 3), (2, 1, 2), [(1, 0), (0, 1), (1, 1)]), ((1, 2, 2), 2, "VALID"),
     ((4, 1, 3), (3, 1, 1), [(0, 2), (0, 0), (2, 1)])],
)  # fmt: skip
def test_frames_as_channels_are_the_3d_convolution(kernel, strides, padding):
    conv = Conv(5, 6, kernel, strides=strides, padding=padding, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 8, 5))

    def run(x, kernel):
        layer = nnx.clone(conv)
        layer.kernel[...] = kernel
        return layer(x)

    def on(chip):
        with spec.target(chip):
            loss = lambda x, kernel: (jnp.square(y := run(x, kernel)).sum(), y)
            grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, conv.kernel[...])
        return (y, *grads)

    for ours, xla in zip(on("cpu"), on("v5e")):
        assert ours.shape == xla.shape
        assert jnp.allclose(ours, xla, atol=1e-3, rtol=1e-4)
