"""Autoencoders that one can follow: the mean of 8x8 pixels, and in time one frame, four behind the first, or 17 to 5."""

from itertools import pairwise

import numpy as np

from opensora_jax.sampling.given import Codec


def _encode(groups):
    def encode(video):
        pooled = np.asarray(video).reshape(len(video), video.shape[1] // 8, 8, video.shape[2] // 8, 8, 3).mean((2, 4))
        return np.stack([pooled[group].mean(0) for group in groups(len(video))]).astype(np.float32)

    return encode


def _decode(groups, frames_of):
    def decode(latents, frames=None):
        latents = np.asarray(latents)[..., :3]
        frames = frames_of(latents.shape[1]) if frames is None else frames
        order = np.concatenate([np.full(len(group), i) for i, group in enumerate(groups(frames))])
        return latents[:, order].repeat(8, 2).repeat(8, 3)

    return decode


def _fours(frames, start=0):
    """One frame, then four at a time."""
    cuts = [start, *range(start + 1, start + frames, 4), start + frames]
    return [range(a, b) for a, b in pairwise(cuts)]


def _seventeens(frames):
    return [group for start in range(0, frames, 17) for group in _fours(min(17, frames - start), start)]


def _codec(groups, frames_of, chunk=None):
    return Codec(_encode(groups), _decode(groups, frames_of), lambda n: len(groups(n)), frames_of, chunk)


FRAMES = _codec(lambda n: [range(i, i + 1) for i in range(n)], lambda n: n)
CAUSAL = _codec(_fours, lambda n: 4 * n - 3)
CHUNKS = _codec(_seventeens, lambda n: n // 5 * 17 + max(0, n % 5 * 4 - 3), chunk=5)
