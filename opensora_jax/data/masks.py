"""Which frames of a training clip are given and which are to be generated (True), over latent frames.

`MaskGenerator` draws a mask a sample (Open-Sora 1.1 and 1.2); `MASK_TYPES` are 1.3's conditions, drawn once a batch.
"""

import random
from collections.abc import Mapping

import numpy as np

from opensora_jax.common.errors import UserError

NAMES = (
    "identity", "random", "intepolate", "quarter_random", "quarter_head", "quarter_tail", "quarter_head_tail",
    "image_random", "image_head", "image_tail", "image_head_tail",
)  # fmt: skip
MASK_TYPES = (
    "none", "i2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_head_noisy", "v2v_tail", "v2v_tail_noisy",
    "other", "other_noisy",
)  # fmt: skip


class MaskGenerator:
    """Draws a kind of mask by its share, then the mask. What the shares leave of 1 is `identity`: nothing is given.

    1.1 spells the names with `mask_` in front and `mask_no` for identity; `interpolate` is taken as the reference's
    `intepolate`.
    """

    def __init__(self, ratios: Mapping[str, float]):
        self.ratios = {}
        for name, share in ratios.items():
            plain = {"no": "identity", "interpolate": "intepolate"}.get(
                name.removeprefix("mask_"), name.removeprefix("mask_")
            )
            if plain not in NAMES:
                raise UserError(f"data.mask_ratios: unknown mask {name!r}; one of {', '.join(NAMES)}")
            if not 0 <= share <= 1:
                raise UserError(f"data.mask_ratios[{name!r}] must lie in [0, 1], got {share}")
            self.ratios[plain] = share
        total = sum(self.ratios.values())
        if total > 1 + 1e-6:
            raise UserError(f"data.mask_ratios add up to {total:.4g}; they must not exceed 1")
        if "identity" not in self.ratios:
            self.ratios["identity"] = 1.0 - total

    def pick(self, uniform: float) -> str:
        """The kind that a uniform draw stands for."""
        reached = 0.0
        for name, share in self.ratios.items():
            reached += share
            if uniform < reached:
                return name
        return "identity"  # the shares' sum may fall short of 1 by rounding

    def __call__(self, num_frames: int, rng: random.Random) -> np.ndarray:
        """[num_frames] bool, True = generate."""
        name = self.pick(rng.random())
        mask = np.ones(num_frames, bool)
        if num_frames > 1:
            mask[_given(name, num_frames, rng)] = False
        if not mask.any():
            mask[-1] = True
        return mask


def _given(name: str, num_frames: int, rng: random.Random) -> np.ndarray:
    frames = np.arange(num_frames)
    if name == "identity":
        return frames[:0]
    if name == "random":
        share = rng.uniform(0.1, 0.9)
        return np.array([frame for frame in frames if rng.random() <= share], int)
    if name == "intepolate":
        return frames[rng.randint(0, 1) :: 2]
    size, place = name.split("_", 1)
    count = 1 if size == "image" else rng.randint(1, max(1, num_frames // 4))
    if place == "random":
        start = rng.randint(0, num_frames - count)
        return frames[start : start + count]
    head, tail = frames[:count], frames[-count:]
    return {"head": head, "tail": tail, "head_tail": np.concatenate([head, tail])}[place]


def pick_mask_type(weights: Mapping[str, float], rng: random.Random) -> str:
    """One of 1.3's conditions, by weight."""
    if unknown := set(weights) - set(MASK_TYPES):
        raise UserError(f"data.mask_types: unknown {sorted(unknown)}; one of {', '.join(MASK_TYPES)}")
    return rng.choices(list(weights), list(weights.values()))[0]


def condition_frames(mask_type: str, num_frames: int, rng: random.Random) -> list[int]:
    """The latent frames that a condition of 1.3 gives; none for images."""
    last = num_frames - 1
    if num_frames <= 1 or mask_type == "none":
        return []
    kind = mask_type.removesuffix("_noisy")
    if kind == "other":  # from one end, any length that leaves something to generate
        length = rng.randint(1, max(1, num_frames - 2))
        return list(range(length)) if rng.random() < 0.5 else list(range(num_frames - length, num_frames))
    return {
        "i2v": [0],
        "i2v_head": [0],
        "i2v_tail": [last],
        "i2v_loop": [0, last],
        "v2v_head": list(range(num_frames // 2)),
        "v2v_tail": list(range(num_frames // 2, num_frames)),
    }[kind]


def latent_frames(
    num_frames: int, *, time_stride: int, time_chunk_frames: int = 0, time_overlap_frames: int = 0
) -> int:
    """Latent frames of a clip: each chunk (1.2's VAE takes 17 frames at a time; 0 = the whole clip) rounds up by itself.
    Chunks of 1.3 share a frame with the one before."""
    chunk, shared = time_chunk_frames or num_frames, time_overlap_frames if num_frames > time_overlap_frames else 0
    whole, rest = divmod(num_frames - shared, max(1, chunk - shared))
    rest += shared if rest else 0
    return whole * -(-chunk // time_stride) + -(-rest // time_stride)
