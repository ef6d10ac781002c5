"""Reference images and videos, as networks are given them: read, scaled and cropped to the clip's size.

references("first.png;last.png", (240, 426))      # two arrays [1, 240, 426, 3] in [-1, 1]
"""

import os
from collections.abc import Sequence

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.data.transforms import crop, normalize, scaled_size
from opensora_jax.data.video_io import VideoError, read_frames, resize

Source = str | os.PathLike | np.ndarray


def references(sources: Source | Sequence[Source] | None, size: tuple[int, int]) -> list[np.ndarray]:
    """Files (several in one string are separated by ;) or uint8 arrays [H, W, 3], [T, H, W, 3] → float32 [T, H, W, 3]
    in [-1, 1], each filling (height, width) and cut around its middle."""
    if sources is None:
        return []
    sources = [sources] if isinstance(sources, str | os.PathLike | np.ndarray) else sources
    parts = []
    for source in sources:
        parts += [name.strip() for name in source.split(";") if name.strip()] if isinstance(source, str) else [source]
    return [reference(part, size) for part in parts]


def reference(source: Source, size: tuple[int, int]) -> np.ndarray:
    scale = scaled_size("resize_crop", size)
    if isinstance(source, np.ndarray):
        frames = source[None] if source.ndim == 3 else source
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise UserError(f"a reference must be uint8 [H, W, 3] or [T, H, W, 3], got {source.dtype} {source.shape}")
        frames = resize(frames, scale(*frames.shape[1:3]))
    else:
        if not os.path.exists(source):
            raise UserError(f"there is no reference file {source}")
        try:
            frames = read_frames(source if isinstance(source, str) else os.fspath(source), size=scale)
        except VideoError as error:
            raise UserError(f"reference {error}") from None
    frames = crop(frames, "resize_crop", size, None)
    pixels = np.empty(frames.shape, np.float32)
    normalize(frames, pixels)
    return pixels
