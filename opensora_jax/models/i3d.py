"""I3D, inflated Inception-v1 on Kinetics-400 (Carreira & Zisserman 2017, arXiv 1705.07750): the network whose 400 logits
FVD compares. Clips of at least 10 frames of 224 x 224 in [-1, 1]."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.norms import BatchNorm

MIXED = {  # outputs of the branches: 1; 1 then 3; 1 then 3; pool then 1
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOL_BEFORE = {  # (window, stride)
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


@dataclass(frozen=True)
class Config:
    num_classes: int = 400
    in_channels: int = 3
    dtype: str = "float32"
    param_dtype: str = "float32"


PRESETS = {"i3d-kinetics-400": Config()}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "I3D":
    return I3D(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    size = (shape.batch, shape.frames, shape.height, shape.width, cfg.in_channels)
    return {"x": jax.ShapeDtypeStruct(size, "float32")}


class Unit(nnx.Module):
    def __init__(self, cfg: Config, inputs, outputs, kernel, stride=1, *, rngs):
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.conv3d = Conv(inputs, outputs, (kernel,) * 3, strides=(stride,) * 3, padding="SAME", bias=False, **kwargs)
        self.bn = BatchNorm(outputs, param_dtype=cfg.param_dtype)

    def __call__(self, x):
        return jax.nn.relu(self.bn(self.conv3d(x)))


class Inception(nnx.Module):
    def __init__(self, cfg: Config, inputs, widths, *, rngs):
        b0, b1a, b1b, b2a, b2b, b3 = widths
        unit = lambda before, after, kernel: Unit(cfg, before, after, kernel, rngs=rngs)
        self.b0 = unit(inputs, b0, 1)
        self.b1a, self.b1b = unit(inputs, b1a, 1), unit(b1a, b1b, 3)
        self.b2a, self.b2b = unit(inputs, b2a, 1), unit(b2a, b2b, 3)
        self.b3b = unit(inputs, b3, 1)

    def __call__(self, x):
        pooled = self.b3b(max_pool(x, (3, 3, 3), (1, 1, 1)))
        return jnp.concatenate([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], -1)


class I3D(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.Conv3d_1a_7x7 = Unit(cfg, cfg.in_channels, 64, 7, 2, rngs=rngs)
        self.Conv3d_2b_1x1 = Unit(cfg, 64, 64, 1, rngs=rngs)
        self.Conv3d_2c_3x3 = Unit(cfg, 64, 192, 3, rngs=rngs)
        width = 192
        for name, widths in MIXED.items():
            setattr(self, name, Inception(cfg, width, widths, rngs=rngs))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Conv(width, cfg.num_classes, (1, 1, 1), dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)

    def __call__(self, x):
        """x [B, T, H, W, 3] in [-1, 1] → logits [B, classes], the mean over time (and space, beyond 224)."""
        return self.logits(self.features(x)).mean((1, 2, 3)).astype(jnp.float32)

    def features(self, x):
        """[B, T', H', W', 1024], pooled over 2 x 7 x 7."""
        x = x.astype(self.cfg.dtype)
        for name in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", *MIXED):
            if name in POOL_BEFORE:
                x = max_pool(x, *POOL_BEFORE[name])
            x = getattr(self, name)(x)
        window = (1, 2, 7, 7, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * 5, "VALID") / (2 * 7 * 7)


def max_pool(x, window, stride):
    """TensorFlow's SAME padding; the reference pads zeros, which is alike after a relu."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
