"""LPIPS of videos, frame by frame; the network (models/lpips.py) arrives as a callable."""

from collections.abc import Callable

import numpy as np


def lpips(distance: Callable, a, b, *, batch: int = 16) -> np.ndarray:
    """a, b [B, T, H, W, C] in [0, 1] → [B, T]. `distance` takes two stacks of frames [N, H, W, 3] in [-1, 1] and
    returns [N], or a map [N, H, W] whose mean counts."""
    frames = [_frames(video) for video in (a, b)]
    results = []
    for start in range(0, len(frames[0]), batch):
        pair = [part[start : start + batch] for part in frames]
        count = len(pair[0])
        padded = [np.pad(part, ((0, batch - count), (0, 0), (0, 0), (0, 0))) for part in pair]  # one compiled size
        out = np.asarray(distance(*padded))[:count]
        results.append(out.reshape(count, -1).mean(1))
    return np.concatenate(results).reshape(np.shape(a)[:2])


def _frames(video):
    video = np.asarray(video, np.float32) * 2 - 1
    if video.shape[-1] == 1:
        video = np.repeat(video, 3, -1)
    return video.reshape(-1, *video.shape[2:])
