"""Latte of Open-Sora-Plan 1.0 (LatteT2V, 1.06B; without text 0.90B): spatial blocks with cross-attention to the caption,
each followed by a temporal block; one adaLN-single for all; sine-cosine positions; learned variance (8 channels out).

Frames may be followed by still images (joint training): spatial blocks see everything, each image with its own
caption, temporal blocks only the video. The Latte of Vchitect (adaLN-Zero, classes) is models/latte.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.stdit import stdit_attention
from opensora_jax.nn.embeddings import CaptionEmbedder, LabelEmbedder, PatchEmbed3D, TimestepEmbedder, unpatchify
from opensora_jax.nn.final_layer import T2IFinalLayer
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.mlp import gelu_erf, gelu_tanh
from opensora_jax.nn.modulate import modulate, table_rows
from opensora_jax.nn.norms import LayerNorm
from opensora_jax.nn.positions import sincos_1d, sincos_2d
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain

ACTIVATIONS = {  # name → (function, is it gated by a second half of the projection?)
    "gelu-approximate": (gelu_tanh, False),
    "gelu": (gelu_erf, False),
    "geglu": (gelu_erf, True),
    "geglu-approximate": (lambda x: x * jax.nn.sigmoid(1.702 * x), False),
}


@dataclass(frozen=True)
class Config:
    sample_size: tuple[int, int] = (64, 64)  # latent size of training; positions of other sizes are stretched to it
    video_length: int = 17  # latent frames of training; sets the scale of temporal positions
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    caption_channels: int = 4096  # 0: no text
    caption_tokens: int = (
        120  # rows of the stored null caption, which 1.0 carries and never uses; 0: none, as in diffusers
    )
    num_classes: int = 0  # labels added to the timestep; the class model of 1.0 cannot run, so this is ours
    class_drop: float = 0.1
    activation: str = "gelu-approximate"
    attention_bias: bool = True
    only_cross_attention: bool = False  # spatial self-attention reads the caption instead
    norm_affine: bool = False
    norm_eps: float = 1e-6
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if self.only_cross_attention and not self.caption_channels:
            raise ValueError("only_cross_attention needs text: set caption_channels")

    @property
    def kwargs(self) -> dict:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


PRESETS = {
    "LatteT2V-XL/122": Config(),
    "LatteT2V-XL/122-65x256": Config(sample_size=(32, 32)),
    "LatteT2V-XL/122-17x256": Config(sample_size=(32, 32), video_length=5),
    "Latte-XL/122": Config(caption_channels=0),
    "LatteT2V-XL/2-vchitect": Config(video_length=5),  # whose times have unit steps at any length
}
REPOSITORIES = {
    "LatteT2V-XL/122": "LanguageBind/Open-Sora-Plan-v1.0.0/65x512x512",
    "LatteT2V-XL/122-65x256": "LanguageBind/Open-Sora-Plan-v1.0.0/65x256x256",
    "LatteT2V-XL/122-17x256": "LanguageBind/Open-Sora-Plan-v1.0.0/17x256x256",
    "LatteT2V-XL/2-vchitect": "maxin-cn/Latte-1/transformer",
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "LatteT2V":
    return LatteT2V(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct((shape.batch, *dims), dtype)

    arrays = {"x": array(shape.frames, shape.height, shape.width, cfg.in_channels), "t": array()}
    if cfg.caption_channels:
        arrays["y"] = array(shape.text_tokens, cfg.caption_channels)
        arrays["text_mask"] = array(shape.text_tokens, dtype="int32")
    if cfg.num_classes:
        arrays["labels"] = array(dtype="int32")
    return arrays


class Attention(nnx.Module):
    """Separate q, k, v projections, as released; self-attention joins them into the fused layout of the kernels."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        width, self.heads = cfg.hidden_size, cfg.num_heads
        if width % self.heads:
            raise ValueError(f"hidden size {width} does not split into {self.heads} heads")
        into = dict(axes=("embed", "heads"), bias=cfg.attention_bias, rngs=rngs, **cfg.kwargs)
        self.to_q = Linear(width, width, **into)
        self.to_k = Linear(width, width, **into)
        self.to_v = Linear(width, width, **into)
        self.to_out = Linear(width, width, ("heads", "embed"), rngs=rngs, **cfg.kwargs)

    def __call__(self, x_btsc, *, mode: str):
        qkv = jnp.concatenate([self.to_q(x_btsc), self.to_k(x_btsc), self.to_v(x_btsc)], -1)
        return self.to_out(stdit_attention(qkv, num_heads=self.heads, mode=mode))

    def cross(self, x_btsc, text, text_mask=None):
        """All frames attend to one caption: text [B, L, C], text_mask [B, L] bool."""
        split = lambda a: a.reshape(a.shape[0], -1, self.heads, a.shape[-1] // self.heads)
        out = attention(split(self.to_q(x_btsc)), split(self.to_k(text)), split(self.to_v(text)), kv_mask=text_mask)
        return self.to_out(out.reshape(x_btsc.shape))


class FeedForward(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.act, self.gated = ACTIVATIONS[cfg.activation]
        width, hidden = cfg.hidden_size, 4 * cfg.hidden_size
        self.fc1 = Linear(width, hidden * (1 + self.gated), ("embed", "mlp"), rngs=rngs, **cfg.kwargs)
        self.fc2 = Linear(hidden, width, ("mlp", "embed"), rngs=rngs, **cfg.kwargs)

    def __call__(self, x):
        h = self.fc1(x)
        if not self.gated:
            return self.fc2(self.act(h))
        value, gate = jnp.split(h, 2, axis=-1)
        return self.fc2(value * self.act(gate))


class Block(nnx.Module):
    """Self-attention, cross-attention (spatial blocks of the text model; no norm, no gate), MLP."""

    def __init__(self, cfg: Config, mode: str, *, rngs: nnx.Rngs):
        width, text = cfg.hidden_size, mode == "spatial" and cfg.caption_channels > 0
        self.mode, self.reads_text_only = mode, text and cfg.only_cross_attention
        norm = lambda: LayerNorm(width, eps=cfg.norm_eps, affine=cfg.norm_affine, param_dtype=cfg.param_dtype)
        self.norm1 = norm()
        self.attn1 = Attention(cfg, rngs=rngs)
        self.attn2 = Attention(cfg, rngs=rngs) if text else None
        # The MLP's norm; released names differ, and exist only with norm_affine.
        self.norm2, self.norm3 = (norm(), None) if text else (None, norm())
        self.ff = FeedForward(cfg, rngs=rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (6, width), cfg.param_dtype) / width**0.5)

    def __call__(self, x, modulation, texts=()):
        """x [B, T, S, C]; modulation [B, 1, 6C]; texts: (features, mask) of the video, then those of the images."""
        rows = table_rows(self.scale_shift_table[...], modulation)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows
        axes = ("batch", "frames", None, None) if self.mode == "spatial" else ("batch", None, "space", None)

        h = constrain(modulate(self.norm1(x), shift_msa, scale_msa), *axes)
        h = _read(self.attn1, h, texts, masked=False) if self.reads_text_only else self.attn1(h, mode=self.mode)
        x = x + _gated(constrain(h, "batch", "frames", "space", None), gate_msa)
        if self.attn2 is not None:
            x = x + _read(self.attn2, x, texts, masked=True)
        h = self.ff(modulate((self.norm2 or self.norm3)(x), shift_mlp, scale_mlp))
        return constrain(x + _gated(h, gate_mlp), "batch", "frames", "space", None)


def _gated(h, gate):
    return (h.astype(jnp.float32) * gate).astype(h.dtype)


def _read(attn: Attention, x, texts, *, masked: bool):
    """Cross-attention of the video to its caption and of each image [B, n, S, C] to its own."""
    (text, mask), *images = texts
    if not images:
        return attn.cross(x, text, mask if masked else None)
    image_text, image_mask = images[0]  # [B, n, L, C], [B, n, L]
    count = image_text.shape[1]
    video, stills = x[:, :-count], x[:, -count:]
    fold = lambda a: a.reshape(-1, *a.shape[2:])
    seen = attn.cross(video, text, mask if masked else None)
    read = attn.cross(fold(stills)[:, None], fold(image_text), fold(image_mask) if masked else None)
    return jnp.concatenate([seen, read.reshape(stills.shape)], 1)


class LatteT2V(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs, width = dict(rngs=rngs, **cfg.kwargs), cfg.hidden_size
        self.x_embedder = PatchEmbed3D((1, cfg.patch_size, cfg.patch_size), cfg.in_channels, width, **kwargs)
        self.t_embedder = TimestepEmbedder(width, **kwargs)
        self.t_block = Linear(width, 6 * width, ("embed", None), **kwargs)
        caption = lambda: CaptionEmbedder(cfg.caption_channels, width, cfg.caption_tokens, **kwargs)
        label = lambda: LabelEmbedder(cfg.num_classes, width, drop_prob=cfg.class_drop, **kwargs)
        self.y_embedder = caption() if cfg.caption_channels else None
        self.label_embedder = label() if cfg.num_classes else None
        self.spatial_blocks = stack(lambda r: Block(cfg, "spatial", rngs=r), cfg.depth, rngs=rngs)
        self.temporal_blocks = stack(lambda r: Block(cfg, "temporal", rngs=r), cfg.depth, rngs=rngs)
        self.final_layer = T2IFinalLayer(width, cfg.patch_size**2 * cfg.out_channels, **kwargs)

    def __call__(
        self, x, t, y=None, text_mask=None, *, labels=None, drop_text=None, drop_label=None,
        images=0, temporal=True, place=True,
    ):  # fmt: skip
        """x [B, T, H, W, C] latents, the last `images` of them stills; t [B] in [0, 999]; y [B, L, D], or
        [B, 1 + images, L, D] with stills; text_mask alike without D. drop_text, drop_label [B] bool take the
        null caption, the null class. temporal=False: frames that do not belong together; place=False: no positions
        in time. Returns [B, T, H, W, out] float32."""
        cfg = self.cfg
        batch, frames, rows, columns, _ = x.shape
        tokens = self.x_embedder(x.astype(cfg.dtype))  # [B, T, H', W', C]
        _, _, grid_h, grid_w, width = tokens.shape
        tokens = (tokens + self._positions(grid_h, grid_w).astype(cfg.dtype)).reshape(batch, frames, -1, width)
        tokens = tap("tokens", constrain(tokens, "batch", "frames", "space", None))

        t_vec = self.t_embedder(t)
        if self.label_embedder is not None:
            t_vec = t_vec + self.label_embedder(labels, drop_label)
        modulation = tap("t_block_out", self.t_block(jax.nn.silu(t_vec)))[:, None]
        texts = self._texts(y, text_mask, images, drop_text)
        video = frames - images
        when = self._times(video).astype(cfg.dtype) if temporal and place else None

        def pair(h, layers):
            spatial, temporal_block, first = layers
            h = tap("spatial_out", spatial(h, modulation, texts))
            if not temporal:
                return h
            moving, stills = h[:, :video], h[:, video:]
            if when is not None:  # positions in time join the stream once, before the first temporal block
                moving = moving + jnp.where(first, when, 0)
            moving = tap("temporal_out", temporal_block(moving, modulation))
            return jnp.concatenate([moving, stills], 1) if images else moving

        layers = (self.spatial_blocks, self.temporal_blocks, jnp.arange(cfg.depth) == 0)
        tokens = run_stack(pair, tokens, layers, remat=cfg.remat)

        out = self.final_layer(tokens, t_vec).reshape(batch, frames, grid_h, grid_w, -1)
        out = unpatchify(out, (1, cfg.patch_size, cfg.patch_size), cfg.out_channels)
        return out[:, :, :rows, :columns].astype(jnp.float32)

    def _positions(self, grid_h, grid_w):
        """[H', W', C]: every size spans the base grid; from 1024 px on the coordinates shrink by the growth."""
        base, scale = self.cfg.sample_size[0] // self.cfg.patch_size, max(self.cfg.sample_size[0] // 64, 1)
        h, w = (jnp.arange(n, dtype=jnp.float32) / (n / base) / scale for n in (grid_h, grid_w))
        return sincos_2d(h, w, self.cfg.hidden_size)

    def _times(self, frames):
        """[T, 1, C]; 5 latent frames (17 of video) have unit steps."""
        return sincos_1d(jnp.arange(frames) / max(self.cfg.video_length // 5, 1), self.cfg.hidden_size)[:, None]

    def _texts(self, y, mask, images, drop):
        """(features [B, L, C], mask [B, L]) of the video and, with stills, ([B, n, L, C], [B, n, L]) of those."""
        if self.y_embedder is None:
            return ()
        y = tap("y_emb", self.y_embedder(y.astype(self.cfg.dtype), drop))
        mask = jnp.ones(y.shape[:-1], bool) if mask is None else mask.astype(bool)
        # A caption that is hidden whole is seen whole: the reference's mask is a finite bias.
        mask = mask | ~mask.any(-1, keepdims=True)
        return ((y[:, 0], mask[:, 0]), (y[:, 1:], mask[:, 1:])) if images else ((y, mask),)
