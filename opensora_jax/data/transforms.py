"""From a clip of any size and length to the frames of a bucket: which frames, which scale, which part."""

import random
from collections.abc import Callable

import numpy as np

from opensora_jax.common.errors import UserError

TRANSFORMS = ("resize_crop", "center", "rand_size_crop")


def frame_indices(total: int, num_frames: int, interval: int, rng: random.Random) -> np.ndarray:
    """`num_frames` evenly spread over a random window of num_frames · interval frames (shorter clips: over all they have)."""
    window = num_frames * interval
    begin = rng.randint(0, max(0, total - window - 1))
    end = min(begin + window, total)
    return np.linspace(begin, end - 1, num_frames, dtype=int)


def scaled_size(name: str, size: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    """(height, width) of a clip → the size to scale it to, before `crop` cuts out the bucket's `size`."""
    if name not in TRANSFORMS:
        raise UserError(f"data.transform: unknown {name!r}; one of {', '.join(TRANSFORMS)}")
    if name == "center" and size[0] != size[1]:
        raise UserError(f"data.transform: center makes squares, but a bucket is {size[0]}x{size[1]}; use resize_crop")

    def scale(height: int, width: int) -> tuple[int, int]:
        if name == "rand_size_crop" and height >= size[0] and width >= size[1]:
            return height, width  # cut from the clip as it is; smaller clips are scaled to cover
        if size[0] / height > size[1] / width:
            return size[0], max(size[1], round(width * size[0] / height))
        return max(size[0], round(height * size[1] / width)), size[1]

    return scale


def crop(frames: np.ndarray, name: str, size: tuple[int, int], rng: random.Random) -> np.ndarray:
    """[T, H, W, C] → the part of `size`: the middle, or anywhere for rand_size_crop."""
    spare_y, spare_x = frames.shape[1] - size[0], frames.shape[2] - size[1]
    if name == "rand_size_crop":
        top, left = rng.randint(0, spare_y), rng.randint(0, spare_x)
    else:
        top, left = spare_y // 2, spare_x // 2
    return frames[:, top : top + size[0], left : left + size[1]]


def normalize(frames: np.ndarray, out: np.ndarray) -> None:
    """uint8 → float32 in [-1, 1], written straight into its place in the batch."""
    np.multiply(frames, np.float32(1 / 127.5), out=out, dtype=np.float32)
    np.subtract(out, np.float32(1), out=out)
