"""Convolutions of video autoencoders: causal in time, and resampling by nearest neighbours."""

import jax.numpy as jnp

from opensora_jax.nn.linear import Conv


class CausalConv3d(Conv):
    """[B, T, H, W, C]: all temporal padding lies in front, so a frame never sees a later one.

    front: frames of padding, by default kernel - 1 (the families differ where the stride is 2). Padding is zeros;
    `time_mode="edge"` repeats the first frame, `space_mode="edge"` the borders."""

    def __init__(self, inputs, outputs, kernel, *, front=None, time_mode="constant", space_mode="constant", **kwargs):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else tuple(kernel)
        pads = [(kernel[0] - 1 if front is None else front, 0), *((size // 2, size // 2) for size in kernel[1:])]
        modes = [time_mode, space_mode, space_mode]
        zeros = [pad if mode == "constant" else (0, 0) for pad, mode in zip(pads, modes)]
        self.edges = tuple(pad if mode == "edge" else (0, 0) for pad, mode in zip(pads, modes))
        super().__init__(inputs, outputs, kernel, padding=zeros, **kwargs)

    def __call__(self, x):
        if any(pad != (0, 0) for pad in self.edges):
            x = jnp.pad(x, [(0, 0), *self.edges, (0, 0)], mode="edge")
        return super().__call__(x)


def upsample_nearest(x, factors):
    """[B, *space, C] → each axis of space repeated `factors[i]` times."""
    for axis, factor in enumerate(factors, 1):
        x = jnp.repeat(x, factor, axis) if factor > 1 else x
    return x
