"""LPIPS, a perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924), on VGG16 (VAE training) or AlexNet (what
the published evaluation tables use): squared differences of unit-length features of five layers, weighted by channel."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv
from opensora_jax.nn.taps import tap

# Of pixels in [-1, 1]; ImageNet's, carried over to that range.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Features:
    """torchvision's numbering. convs: (index, outputs, kernel, stride, padding); pooling before some of them."""

    slices: tuple[tuple[tuple[int, int, int, int, int], ...], ...]  # a tap follows each slice's last activation
    pool: int  # window; the stride is 2

    @property
    def widths(self) -> list[int]:
        return [convs[-1][1] for convs in self.slices]


def _vgg(*slices):
    return tuple(tuple((i, width, 3, 1, 1) for i in indices) for width, indices in slices)


NETWORKS = {
    "vgg": Features(
        _vgg((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28))), 2
    ),
    "alex": Features(
        (((0, 64, 11, 4, 2),), ((3, 192, 5, 1, 2),), ((6, 384, 3, 1, 1),), ((8, 256, 3, 1, 1),), ((10, 256, 3, 1, 1),)),
        3,
    ),
}
POOLED = {"vgg": (1, 2, 3, 4), "alex": (1, 2)}  # slices that begin with pooling


@dataclass(frozen=True)
class Config:
    net: str = "vgg"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.net not in NETWORKS:
            raise ValueError(f"lpips: net={self.net!r} is unknown; choose one of {', '.join(NETWORKS)}")


PRESETS = {"lpips-vgg": Config(), "lpips-alex": Config("alex")}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "LPIPS":
    return LPIPS(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    frames = jax.ShapeDtypeStruct((shape.batch * shape.frames, shape.height, shape.width, 3), "float32")
    return {"x": frames, "y": frames}


class LPIPS(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.net = cfg, NETWORKS[cfg.net]
        conv = partial(Conv, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width, slices = 3, []
        for convs in self.net.slices:
            layers: list = [None] * (convs[-1][0] + 1)  # torchvision's numbering
            for i, outputs, kernel, stride, padding in convs:
                pads = ((padding, padding),) * 2
                layers[i] = conv(width, outputs, (kernel, kernel), strides=stride, padding=pads)
                width = outputs
            slices.append(Layers(layers))
        self.slices = Layers(slices)
        self.lin = Layers(ChannelWeights(width, cfg.param_dtype) for width in self.net.widths)

    def __call__(self, x, y, *, spatial: bool = False):
        """x, y [N, H, W, 3] in [-1, 1] → distances [N], or with `spatial` a map [N, H, W]."""
        total = jnp.zeros(())
        for lin, a, b in zip(self.lin, self.features(x), self.features(y)):
            distance = lin(jnp.square(_unit(a) - _unit(b)))  # [N, h, w]
            if spatial:
                total = total + jax.image.resize(distance, x.shape[:3], "linear")
            else:
                total = total + distance.mean((1, 2))
        return total

    def features(self, x) -> list:
        """After each slice's last activation, [N, h, w, C] float32."""
        x = ((x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)).astype(self.cfg.dtype)
        found = []
        for number, (layers, convs) in enumerate(zip(self.slices, self.net.slices)):
            if number in POOLED[self.cfg.net]:
                window = (1, self.net.pool, self.net.pool, 1)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
            for i, *_ in convs:
                x = jax.nn.relu(layers[i](x))
            found.append(tap(f"slice{number + 1}", x.astype(jnp.float32)))
        return found


class ChannelWeights(nnx.Module):
    def __init__(self, width: int, param_dtype):
        self.weight = nnx.Param(jnp.full(width, 1 / width, param_dtype))

    def __call__(self, x):
        return x @ self.weight[...]


def _unit(x):
    # The root of zero has no gradient: equal images must still have one.
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(squares, 1e-30)) + 1e-10)
