"""PatchGAN discriminators (Isola et al. 2017, arXiv 1611.07004) of the adversarial VAE losses: over frames in
Open-Sora-Plan 1.0, over clips in the Plan, Open-Sora 1.2, 1.3 and 2.0.

    logits = net(params, x)                                     # running statistics
    logits, moved = net(params, x, method="train_step")         # statistics of the batch; `moved` are new buffers
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv, normal
from opensora_jax.nn.norms import BatchNorm, running_statistics

INIT = normal(0.02)


@dataclass(frozen=True)
class Config:
    in_channels: int = 3
    features: int = 64
    layers: int = 3  # strided layers; one more and the head follow
    rank: int = 3  # 2: each frame by itself
    kernel: int = 4
    time_strides: int = 1  # of the strided layers, how many also halve time
    norm: str = "batch"  # or "actnorm": an affine map per channel, started from the first batch
    dropout: float = 0.0  # after each normalised layer; Open-Sora 2.0 uses 0.3
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.rank not in (2, 3) or self.norm not in ("batch", "actnorm"):
            raise ValueError(f"discriminator: rank is 2 or 3, norm is batch or actnorm; got {self.rank}, {self.norm}")


PRESETS = {
    "plan-2d": Config(rank=2),
    "v1.2": Config(),
    "v1.3": Config(kernel=3, time_strides=2),
    "v2.0": Config(kernel=3, time_strides=2, layers=5, dropout=0.3),
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "Discriminator":
    return Discriminator(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    size = (shape.batch, shape.frames, shape.height, shape.width, cfg.in_channels)
    return {"x": jax.ShapeDtypeStruct(size, "float32")}


class ActNorm(nnx.Module):
    """(x + shift) * gain, per channel; `start` takes both from a batch so that it comes out standardised."""

    def __init__(self, features: int, *, param_dtype="float32"):
        self.shift = nnx.Param(jnp.zeros(features, param_dtype))
        self.gain = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x, *, train: bool = False):
        return ((x + self.shift[...]) * self.gain[...]).astype(x.dtype)

    @staticmethod
    def start(x) -> dict:
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return {"shift": -flat.mean(0), "gain": 1 / (flat.std(0, ddof=1) + 1e-6)}


class Discriminator(nnx.Module):
    """x [B, T, H, W, C] in [-1, 1] → logits, one a patch: [B, T', H', W', 1], with rank 2 [B * T, H', W', 1]."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        widths = [cfg.features * min(2**n, 8) for n in range(cfg.layers + 1)]

        def conv(inputs, outputs, strides, bias):
            return Conv(
                inputs, outputs, (cfg.kernel,) * cfg.rank, strides=strides[-cfg.rank :], padding=((1, 1),) * cfg.rank,
                bias=bias, init=INIT, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs,
            )  # fmt: skip

        halves = [(2 if n < cfg.time_strides else 1, 2, 2) for n in range(cfg.layers)] + [(1, 1, 1)]
        norm = BatchNorm if cfg.norm == "batch" else ActNorm
        bias = cfg.norm != "batch"  # batch norm takes any constant away
        layers = [conv(cfg.in_channels, widths[0], halves[0], True), None]
        for before, width, strides in zip(widths, widths[1:], halves[1:]):
            layers += [conv(before, width, strides, bias), norm(width, param_dtype=cfg.param_dtype), None]
        self.main = Layers([*layers, conv(widths[-1], 1, (1, 1, 1), True)])  # None: where activations are counted

    def __call__(self, x, *, train: bool = False, key=None):
        x = self._fold(x).astype(self.cfg.dtype)
        h = _leaky(self.main[0](x))
        for i in range(2, len(self.main) - 1, 3):
            h = _leaky(self.main[i + 1](self.main[i](h), train=train))
            if key is not None and self.cfg.dropout:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.cfg.dropout, h.shape)
                h = jnp.where(keep, h / (1 - self.cfg.dropout), 0)
        return self.main[-1](h).astype(jnp.float32)

    def train_step(self, x, key=None):
        """Logits by the statistics of the batch, and the running statistics after it (to be merged into params)."""
        return self(x, train=True, key=key), running_statistics(self)

    def started(self, x) -> dict:
        """Parameters of the ActNorm layers after the first batch, nested like params."""
        h, found = _leaky(self.main[0](self._fold(x))), {}
        for i in range(2, len(self.main) - 1, 3):
            h = self.main[i](h)
            found[str(i + 1)] = start = ActNorm.start(h)
            h = _leaky((h + start["shift"]) * start["gain"])
        return {"main": found}

    def _fold(self, x):
        return x.reshape(-1, *x.shape[-3:]) if self.cfg.rank == 2 else x


def _leaky(x):
    return jax.nn.leaky_relu(x, 0.2)
