"""The real attention shapes of every model and bucket: correctness tests, benchmarks and block tables read this list.

`Case.small()` keeps what makes a shape special (head size, raggedness, packing) at a size for the CPU.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """`kind`: spatial or temporal (STDiT rows of [batch, frames, positions, 3C]) or attention (queries x keys)."""

    name: str
    kind: str
    batch: int
    queries: int  # STDiT: frames
    keys: int  # STDiT: positions of a frame
    heads: int = 16
    head_dim: int = 72
    norm: bool = False
    rope: bool = False
    norm_before_rope: bool = True
    window: bool = False  # padded tokens are hidden (1.3)
    ragged: bool = False  # text lengths from 0 to all
    causal: bool = False

    @property
    def fused(self) -> bool:
        return self.kind != "attention"

    @property
    def row(self) -> int:
        """Keys that one query sees at most."""
        return self.queries if self.kind == "temporal" else self.keys

    @property
    def tokens(self) -> int:
        return self.batch * self.queries * (self.keys if self.fused else 1)

    def lengths(self) -> np.ndarray:
        """Visible keys per sample: none, one, all and others in between."""
        if not self.ragged:
            return np.full(self.batch, self.row)
        spread = np.linspace(0, self.keys, self.batch).astype(np.int32)
        return spread if self.batch > 1 else np.array([self.keys - 3], np.int32)

    def flops(self) -> float:
        """Useful ones of the forward pass: two products, hidden keys and padding not counted."""
        share = self.lengths().mean() * (0.5 if self.causal else 1.0)
        return 4.0 * self.tokens * share * self.heads * self.head_dim

    def bytes(self, itemsize: int = 2) -> float:
        """q, k, v and the output, once each."""
        keys = 0 if self.fused else self.lengths().sum() * self.heads * self.head_dim
        return itemsize * (self.tokens * self.heads * self.head_dim * (4 if self.fused else 2) + 2 * keys)

    def small(self) -> "Case":
        shrink = lambda n, most: n if n <= most else most - 8 + n % 8
        positions = {"spatial": (2, shrink(self.keys, 72)), "temporal": (shrink(self.queries, 64), 9)}
        queries, keys = positions.get(self.kind, (shrink(self.queries, 72), shrink(self.keys, 88)))
        return replace(self, batch=min(self.batch, 2), queries=queries, keys=keys, heads=2)

    def inputs(self, seed: int = 0, dtype=jnp.bfloat16):
        """(arrays to differentiate, the other keyword arguments)."""
        keys = jax.random.split(jax.random.key(seed), 6)
        normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(dtype)
        size = self.heads * self.head_dim
        if not self.fused:
            q = normal(keys[0], self.batch, self.queries, self.heads, self.head_dim)
            k, v = (normal(key, self.batch, self.keys, self.heads, self.head_dim) for key in keys[1:3])
            extras = {"causal": True} if self.causal else {}
            return (q, k, v), extras | ({"kv_lengths": jnp.asarray(self.lengths(), jnp.int32)} if self.ragged else {})
        arrays = (normal(keys[0], self.batch, self.queries, self.keys, 3 * size),)
        extras = {"num_heads": self.heads, "mode": self.kind, "norm_before_rope": self.norm_before_rope}
        if self.norm:
            weights = tuple(1 + 0.3 * jax.random.normal(key, (self.head_dim,)) for key in keys[1:3])
            extras |= dict(zip(("q_scale", "k_scale"), weights))
        if self.rope:
            rates = 1e4 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
            angles = jnp.asarray(np.repeat(np.arange(self.row)[:, None] * rates, 2, axis=1), jnp.float32)
            extras["rope"] = (jnp.cos(angles), jnp.sin(angles))
        if self.window:
            shown = np.ones((self.batch, self.row), bool)
            shown[:, np.arange(self.row) % 8 >= 6] = False
            extras["kv_mask"] = jnp.asarray(shown)
        return arrays, extras


def spatial(name, batch, frames, positions, **options):
    return Case(name, "spatial", batch, frames, positions, **options)


def temporal(name, batch, frames, positions, **options):
    return Case(name, "temporal", batch, frames, positions, **options)


def cross(name, batch, queries, keys, **options):
    return Case(name, "attention", batch, queries, keys, **options)


V12 = {"norm": True, "rope": True}
CASES = [
    # Open-Sora 1.0 (STDiT): plain heads of 72
    spatial("v1.0 spatial 16x256", 4, 16, 256),
    spatial("v1.0 spatial 64x512", 1, 64, 1024),
    temporal("v1.0 temporal T=16", 16, 16, 1024),
    temporal("v1.0 temporal T=32", 8, 32, 1024),
    temporal("v1.0 temporal T=64", 4, 64, 1024),
    cross("v1.0 cross 64x512 text 120", 4, 16384, 120, ragged=True),
    cross("v1.0 spatial 1080p", 1, 8160, 8160),  # rows of spatial attention longer than its own kernel takes
    # 1.1 (STDiT2): rotation before the norm
    temporal("v1.1 temporal T=16 360p", 2, 16, 920, norm_before_rope=False, **V12),
    # 1.2 (STDiT3): q/k norm everywhere, rotation in temporal blocks, ragged positions
    spatial("v1.2 spatial 360p", 2, 15, 920, norm=True),
    spatial("v1.2 spatial 480p", 1, 30, 1590, norm=True),
    spatial("v1.2 spatial 720p", 1, 15, 3600, norm=True),
    temporal("v1.2 temporal T=15 360p", 8, 15, 920, **V12),
    temporal("v1.2 temporal T=30 480p", 4, 30, 1590, **V12),
    temporal("v1.2 temporal T=60 720p", 1, 60, 3600, **V12),
    temporal("v1.2 temporal T=120 480p", 1, 120, 1590, **V12),
    cross("v1.2 cross 480p text 300", 2, 47700, 300, ragged=True),
    # 1.3: 8 x 8 x T windows with padded tokens, rotation over frame, row and column
    spatial("v1.3 window T=15", 15, 1, 960, window=True, **V12),
    spatial("v1.3 spatial 720p", 1, 15, 3600, **V12),
    # DiT, Latte, PixArt, Open-Sora-Plan 1.0
    cross("DiT full attention 16x256", 1, 4096, 4096),
    cross("DiT image 512px", 64, 1024, 1024),
    cross("PixArt self 1024px", 2, 4096, 4096),
    cross("LatteT2V spatial 65x512", 17, 4096, 4096),
    # Open-Sora 2.0 (MMDiT): joint text and video
    cross("v2.0 joint 256px", 1, 8828, 8828, heads=24, head_dim=128),
    cross("v2.0 joint 16k", 1, 16384, 16384, heads=24, head_dim=128),
    # text encoders
    cross("CLIP text", 8, 77, 77, heads=12, head_dim=64, causal=True),
]
BY_NAME = {case.name: case for case in CASES}
