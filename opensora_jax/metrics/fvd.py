"""Fréchet video distance (Unterthiner et al. 2018, arXiv 1812.01717): how far apart two sets of videos lie, as Gaussians
of their I3D logits. The network (models/i3d.py) arrives as a callable.

Two conventions are in use and give different numbers: "styleganv" feeds the frames as they are, "videogpt" rounds them
down to 8 bits before it resizes. Both resize without antialiasing.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

CONVENTIONS = ("styleganv", "videogpt")
MIN_FRAMES = 10  # of I3D: fewer leave nothing to pool over


def preprocess(videos, convention: str = "styleganv", size: int = 224) -> jax.Array:
    """[B, T, H, W, C] in [0, 1] → [B, T, size, size, 3] in [-1, 1]: the shorter side to `size`, then the centre."""
    if convention not in CONVENTIONS:
        raise ValueError(f"fvd: convention {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")
    videos = np.asarray(videos, np.float32)
    if videos.shape[-1] == 1:
        videos = np.repeat(videos, 3, -1)
    if convention == "videogpt":
        videos = eight_bits(videos).astype(np.float32) / 255
    _, _, height, width, _ = videos.shape
    scale = size / min(height, width)
    target = (size, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size)
    videos = jax.image.resize(jnp.asarray(videos), (*videos.shape[:2], *target, 3), "linear", antialias=False)
    top, left = ((side - size) // 2 for side in target)
    return (videos[:, :, top : top + size, left : left + size] - 0.5) * 2


def eight_bits(videos) -> np.ndarray:
    """[0, 1] to 0 ... 255, towards zero."""
    return (np.asarray(videos, np.float32) * np.float32(255)).astype(np.uint8)


def features(network: Callable, videos, *, convention: str = "styleganv", batch: int = 10) -> np.ndarray:
    """Logits [N, classes] of [N, T, H, W, C] in [0, 1]."""
    found = []
    for start in range(0, len(videos), batch):
        part = preprocess(videos[start : start + batch], convention)
        padded = jnp.pad(part, ((0, batch - len(part)), *[(0, 0)] * 4))  # one compiled size
        found.append(np.asarray(network(padded))[: len(part)])
    return np.concatenate(found)


def frechet_distance(a, b) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features [N, D]; single samples have no covariance, and only the
    first term counts."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    distance = np.square(a.mean(0) - b.mean(0)).sum()
    if min(len(a), len(b)) > 1:
        first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
        values, vectors = np.linalg.eigh(first)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        # The product's root has the trace of this symmetric matrix's, which is stable where covariances are singular.
        product = np.linalg.eigvalsh(root @ second @ root)
        distance += np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(distance)


def fvd(network: Callable, real, generated, *, convention: str = "styleganv", lengths: Iterable[int] = (), batch=10):
    """{clip length: distance} of two sets of videos [N, T, H, W, C] in [0, 1]; by default of their whole length."""
    frames = min(np.shape(real)[1], np.shape(generated)[1])
    lengths = tuple(lengths) or (frames,)
    if min(lengths) < MIN_FRAMES or max(lengths) > frames:
        raise ValueError(
            f"fvd needs clips of {MIN_FRAMES} to {frames} frames, asked for {min(lengths)} to {max(lengths)}"
        )
    sets = (real, generated)
    of = lambda videos, length: features(network, videos[:, :length], convention=convention, batch=batch)
    return {length: frechet_distance(*(of(videos, length) for videos in sets)) for length in lengths}
