"""VQ-VAE of VideoGPT (Yan et al. 2021, arXiv 2104.10157): strided convolutions and axial attention around a codebook
that follows its codes by moving averages. Open-Sora-Plan 1.0 trains and uses it (VQVAEModel_4x4x4 and others).

    codes = net(params, x, method="codes")                  # [B, t, h, w] int32
    video = net(params, codes, method="decode_codes")
    (video, quantised, z), moved = net(params, x, method="train_step")
    codebook = update_codebook(params["codebook"], z, quantised.codes, key)      # after a step; the rest by gradient

Diffusion works on latents before quantisation: `decode` quantises what it is given.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.attention import attention
from opensora_jax.nn.layers import Layers
from opensora_jax.nn.linear import Conv, Linear, normal
from opensora_jax.nn.norms import BatchNorm, running_statistics
from opensora_jax.nn.params import Buffer
from opensora_jax.nn.taps import tap

HEADS = 2
DATA_VARIANCE = 0.06  # of videos in [-0.5, 0.5]; scales the reconstruction loss
COMMITMENT = 0.25
DECAY = 0.99


@dataclass(frozen=True)
class Config:
    embedding_dim: int = 256
    n_codes: int = 2048
    n_hiddens: int = 240
    n_res_layers: int = 4
    downsample: tuple[int, int, int] = (4, 4, 4)  # of time, height, width: powers of two
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if any(size < 1 or size & (size - 1) for size in self.downsample) or max(self.downsample) < 2:
            raise ValueError(f"vqvae: downsample={self.downsample} must be powers of two, at least one above 1")

    def strides(self) -> list[tuple[int, ...]]:
        """Of the convolutions, first to last: each axis halves until its factor is used up."""
        halvings = [int(math.log2(size)) for size in self.downsample]
        return [tuple(2 if n > i else 1 for n in halvings) for i in range(max(halvings))]


PRESETS = {
    "bair_stride4x2x2": Config(downsample=(4, 2, 2)),
    "ucf101_stride4x4x4": Config(),
    "kinetics_stride4x4x4": Config(),
    "kinetics_stride2x4x4": Config(downsample=(2, 4, 4)),
    "4x8x8": Config(downsample=(4, 8, 8)),
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "VQVAE":
    return VQVAE(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    """A clip whose latents have this shape."""
    sizes = [size * factor for size, factor in zip((shape.frames, shape.height, shape.width), cfg.downsample)]
    return {"x": jax.ShapeDtypeStruct((shape.batch, *sizes, 3), "float32")}


def latent_size(cfg: Config, frames, height, width) -> tuple:
    """[T, H, W] of pixels → of latents; None stays None."""
    sizes = zip((frames, height, width), cfg.downsample)
    return tuple(None if size is None else size // factor for size, factor in sizes)


class Quantised(NamedTuple):
    embeddings: jax.Array  # [B, t, h, w, D]; the gradient passes straight through to what was quantised
    codes: jax.Array  # [B, t, h, w] int32
    commitment_loss: jax.Array
    perplexity: jax.Array  # how many codes are in use, were all used alike


def distances(z, embeddings):
    """Squared distances [..., codes] of z [..., D] to the rows of embeddings [codes, D], in float32."""
    z = z.astype(jnp.float32)
    return jnp.square(z).sum(-1, keepdims=True) - 2 * z @ embeddings.T + jnp.square(embeddings).sum(-1)


def quantise(z, embeddings) -> Quantised:
    embeddings = jax.lax.stop_gradient(embeddings.astype(jnp.float32))
    codes = jnp.argmin(distances(z, embeddings), -1)
    chosen = embeddings[codes]
    usage = jnp.bincount(codes.reshape(-1), length=embeddings.shape[0]) / codes.size
    return Quantised(
        jax.lax.stop_gradient(chosen - z) + z,
        codes,
        COMMITMENT * jnp.square(z - chosen).mean(),
        jnp.exp(-(usage * jnp.log(usage + 1e-10)).sum()),
    )


def update_codebook(codebook: dict, z, codes, key=None) -> dict:
    """The codebook after a batch: counts and sums of the vectors of each code move by 1 %, embeddings are their
    quotients. With a key, codes that fewer than one vector a batch asks for start anew at random vectors."""
    flat = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    rows = codes.reshape(-1)
    total = codebook["embeddings"].shape[0]
    count = jnp.bincount(rows, length=total).astype(jnp.float32)
    sums = jax.ops.segment_sum(flat, rows, total)
    count = DECAY * codebook["count"] + (1 - DECAY) * count
    sums = DECAY * codebook["sum"] + (1 - DECAY) * sums
    everything = count.sum()
    weights = (count + 1e-7) / (everything + total * 1e-7) * everything
    embeddings = sums / weights[:, None]
    if key is not None:
        embeddings = jnp.where(count[:, None] >= 1, embeddings, _random_rows(flat, total, key))
    return {"embeddings": embeddings, "count": count, "sum": sums}


def start_codebook(z, total: int, key) -> dict:
    """The first codebook: random vectors of the first batch, each counted once."""
    rows = _random_rows(z.reshape(-1, z.shape[-1]).astype(jnp.float32), total, key)
    return {"embeddings": rows, "count": jnp.ones(total), "sum": rows}


def _random_rows(flat, total: int, key):
    """`total` different rows; when there are fewer, copies with a little noise."""
    pick, shake = jax.random.split(key)
    if len(flat) < total:
        flat = jnp.tile(flat, (-(-total // len(flat)), 1))
        flat = flat + jax.random.normal(shake, flat.shape) * 0.01 / math.sqrt(flat.shape[1])
    return flat[jax.random.permutation(pick, len(flat))[:total]]


def reconstruction_loss(reconstruction, x):
    """Both in [-1, 1]; the reference's figure, which is for [-0.5, 0.5]."""
    return jnp.square((reconstruction - x) / 2).mean() / DATA_VARIANCE


class VQVAE(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.pre_vq_conv = _conv(cfg, cfg.n_hiddens, cfg.embedding_dim, 1, rngs=rngs)
        self.post_vq_conv = _conv(cfg, cfg.embedding_dim, cfg.n_hiddens, 1, rngs=rngs)
        self.codebook = Codebook(cfg, rngs=rngs)

    def encode(self, x, key=None, *, train: bool = False):
        """x [B, T, H, W, 3] in [-1, 1] → latents before quantisation [B, t, h, w, D]; nothing here is drawn by key."""
        if any(size % factor for size, factor in zip(x.shape[1:4], self.cfg.downsample)):
            raise UserError(f"vqvae: a clip of {x.shape[1:4]} (T, H, W) does not divide by {self.cfg.downsample}")
        h = tap("encoder", self.encoder((x / 2).astype(self.cfg.dtype), train=train))
        return self.pre_vq_conv(h).astype(jnp.float32)

    def codes(self, x):
        return self.quantise(self.encode(x)).codes

    def quantise(self, z) -> Quantised:
        return quantise(z, self.codebook.embeddings[...])

    def decode(self, z, num_frames=None):
        """Latents, quantised or not → [B, T, H, W, 3] float32 in [-1, 1], cut to num_frames."""
        return self._pixels(self.quantise(z).embeddings)[:, :num_frames]

    def decode_codes(self, codes):
        return self._pixels(self.codebook.embeddings[...][codes])

    def __call__(self, x, *, train: bool = False):
        """Reconstruction, what was quantised and the latents before."""
        z = self.encode(x, train=train)
        quantised = self.quantise(z)
        return self._pixels(quantised.embeddings, train=train), quantised, z

    def train_step(self, x):
        """The same by the statistics of the batch, and the buffers after it; those of the codebook move by
        `update_codebook` instead."""
        out = self(x, train=True)
        return out, {name: part for name, part in running_statistics(self).items() if name != "codebook"}

    def _pixels(self, embeddings, *, train: bool = False):
        h = self.post_vq_conv(embeddings.astype(self.cfg.dtype))
        return 2 * self.decoder(h, train=train).astype(jnp.float32)


class Codebook(nnx.Module):
    def __init__(self, cfg: Config, *, rngs):
        size = (cfg.n_codes, cfg.embedding_dim)
        self.embeddings = Buffer(jax.random.normal(rngs.params(), size, cfg.param_dtype))
        self.count = Buffer(jnp.zeros(cfg.n_codes, cfg.param_dtype))
        self.sum = Buffer(self.embeddings[...])


class Encoder(nnx.Module):
    def __init__(self, cfg: Config, *, rngs):
        widths = [3] + [cfg.n_hiddens] * len(cfg.strides())
        self.convs = Layers(
            _conv(cfg, before, cfg.n_hiddens, 4, strides, rngs=rngs) for before, strides in zip(widths, cfg.strides())
        )
        self.conv_last = _conv(cfg, cfg.n_hiddens, cfg.n_hiddens, 3, rngs=rngs)
        self.res_stack = _res_stack(cfg, rngs)

    def __call__(self, x, *, train: bool):
        for i, conv in enumerate(self.convs):
            x = tap(f"conv{i}", jax.nn.relu(conv(x)))
        return _run(self.res_stack, self.conv_last(x), train)


class Decoder(nnx.Module):
    def __init__(self, cfg: Config, *, rngs):
        self.res_stack = _res_stack(cfg, rngs)
        strides = cfg.strides()
        self.convts = Layers(
            SamePadConvTranspose(cfg, cfg.n_hiddens, 3 if i == len(strides) - 1 else cfg.n_hiddens, stride, rngs=rngs)
            for i, stride in enumerate(strides)
        )

    def __call__(self, x, *, train: bool):
        x = tap("dec_res", _run(self.res_stack, x, train))
        for i, convt in enumerate(self.convts):
            x = convt(x if i == 0 else jax.nn.relu(x))
        return x


def _res_stack(cfg: Config, rngs) -> Layers:
    blocks = [ResidualBlock(cfg, rngs=rngs) for _ in range(cfg.n_res_layers)]
    return Layers([*blocks, BatchNorm(cfg.n_hiddens, param_dtype=cfg.param_dtype)])


def _run(res_stack: Layers, x, train: bool):
    for layer in res_stack:
        x = layer(x, train=train)
    return jax.nn.relu(x)


class ResidualBlock(nnx.Module):
    """Norm, relu, convolution (3, then 1 wide), then axial attention; the input is added."""

    def __init__(self, cfg: Config, *, rngs):
        wide, narrow = cfg.n_hiddens, cfg.n_hiddens // 2
        norm = lambda width: BatchNorm(width, param_dtype=cfg.param_dtype)
        self.norm1, self.norm2, self.norm3 = norm(wide), norm(narrow), norm(wide)
        self.conv1 = _conv(cfg, wide, narrow, 3, bias=False, rngs=rngs)
        self.conv2 = _conv(cfg, narrow, wide, 1, bias=False, rngs=rngs)
        self.attn_t, self.attn_h, self.attn_w = (AxialAttention(cfg, axis, rngs=rngs) for axis in (1, 2, 3))

    def __call__(self, x, *, train: bool):
        h = self.conv1(jax.nn.relu(self.norm1(x, train=train)))
        h = self.conv2(jax.nn.relu(self.norm2(h, train=train)))
        h = jax.nn.relu(self.norm3(h, train=train))
        return x + self.attn_w(h) + self.attn_h(h) + self.attn_t(h)


class AxialAttention(nnx.Module):
    """Attention along one axis of [B, T, H, W, C], with its own projections."""

    def __init__(self, cfg: Config, axis: int, *, rngs):
        self.axis, width = axis, cfg.n_hiddens
        kwargs = dict(init=normal(width**-0.5), dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        self.q, self.k, self.v = (Linear(width, width, ("embed", "heads"), bias=False, **kwargs) for _ in range(3))
        self.out = Linear(width, width, ("heads", "embed"), **kwargs)

    def __call__(self, x):
        moved = jnp.moveaxis(x, self.axis, -2)
        rows = lambda project: project(moved).reshape(-1, moved.shape[-2], HEADS, moved.shape[-1] // HEADS)
        out = attention(rows(self.q), rows(self.k), rows(self.v))
        return self.out(jnp.moveaxis(out.reshape(moved.shape), -2, self.axis))


def _pads(kernel: int, strides):
    """Of each axis: what keeps size / stride, the larger half in front."""
    return [((kernel - stride + 1) // 2, (kernel - stride) // 2) for stride in strides]


def _conv(cfg: Config, inputs, outputs, kernel, strides=(1, 1, 1), *, bias=True, rngs) -> Conv:
    return Conv(
        inputs, outputs, (kernel,) * 3, strides=strides, padding=_pads(kernel, strides), bias=bias,
        dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs,
    )  # fmt: skip


class SamePadConvTranspose(Conv):
    """A transposed convolution to size x stride: the input is padded like that of the forward one, the result cut."""

    def __init__(self, cfg: Config, inputs, outputs, strides, *, kernel: int = 4, rngs):
        self.stride, self.pads = strides, _pads(kernel, strides)
        super().__init__(inputs, outputs, (kernel,) * 3, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)

    def __call__(self, x):
        kernel = jnp.flip(self.kernel[...].astype(self.dtype), (0, 1, 2))
        x = jnp.pad(x, [(0, 0), *self.pads, (0, 0)])
        out = jax.lax.conv_general_dilated(
            x, kernel, (1,) * 3, ((0, 0),) * 3, self.stride, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        return out + self.bias[...].astype(out.dtype)
