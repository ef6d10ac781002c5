"""Buckets: which resolution, length and aspect ratio a clip is trained at, exactly as Open-Sora 1.1 to 2.0 decide it.

A table is {resolution: {frames: (keep, batch_size)}}; `keep` is a probability or a pair (keep, enter): with probability
1 - enter a clip passes this length by and tries the next shorter one. A keep of 0 sends clips on to lower resolutions.
Resolutions are tried from the largest, lengths from the longest. A draw depends only on (seed, resolution, frames).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opensora_jax.common.aspect import VERSIONS, aspect_table, closest_ratio
from opensora_jax.common.errors import UserError

AREA_TOLERANCE = 0.8  # a clip qualifies for a resolution from this share of its pixels on


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of batch."""

    resolution: str
    num_frames: int
    aspect: str
    height: int
    width: int
    batch_size: Any  # a number in training; tables for the batch-size search hold ranges

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.num_frames, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.resolution} {self.num_frames}f {self.height}x{self.width}"


@dataclass(frozen=True)
class Level:
    """One cell of the table: a resolution and a length."""

    id: int  # enters the seed of every draw
    resolution: str
    num_frames: int
    keep: float
    enter: float | None  # None where the table gives no pair: then there is no draw for it either
    batch_size: Any

    @property
    def used(self) -> bool:
        return self.keep > 0

    @property
    def draws_to_enter(self) -> bool:
        return self.enter is not None and (self.enter < 1 or self.keep < 1)


class BucketTable:
    """Assigns clips to buckets. `aspect_first` is 1.3's other rule: the ratio first, then what fits inside the clip."""

    def __init__(
        self,
        config: Mapping,
        version: str = "1.2",
        *,
        aspect_first: bool = False,
        multiple: int = 16,
        area_tolerance: float = AREA_TOLERANCE,
    ):
        if version not in VERSIONS:
            raise UserError(f"data.bucket_version: unknown version {version!r}; one of {', '.join(VERSIONS)}")
        if not config:
            raise UserError("data.buckets is empty: give at least one {resolution: {frames: (keep, batch_size)}}")
        config = {str(name): cells for name, cells in config.items()}
        self.version, self.aspect_first, self.area_tolerance = version, aspect_first, area_tolerance
        self.pixels, self.aspects, self.levels = {}, {}, {}
        for name in config:
            try:
                self.pixels[name], self.aspects[name] = aspect_table(name, version, multiple=multiple)
            except ValueError as error:
                raise UserError(f"data.buckets: {error}") from None
        self.order = sorted(config, key=self.pixels.get, reverse=True)
        count = 0
        for name in self.order:
            cells = {int(frames): cell for frames, cell in config[name].items()}
            self.levels[name] = []
            for frames in sorted(cells, reverse=True):
                self.levels[name].append(_level(count, name, frames, cells[frames]))
                count += 1
        self.num_buckets = sum(len(self.levels[name]) * len(self.aspects[name]) for name in self.order)
        self._ratios = self._merged_ratios(config) if aspect_first else None

    def assign(self, frames: int, height: int, width: int, *, interval: int = 1, seed: int = 0) -> Bucket | None:
        """The bucket of a clip, or None where no level takes it."""
        return self._walk(frames, height, width, interval, lambda level: np.random.default_rng(seed + level.id))

    def certain(self, frames: int, height: int, width: int, *, interval: int = 1) -> tuple[bool, Bucket | None]:
        """(True, bucket) when no draw is involved, so that all clips of this shape go the same way; else (False, None)."""
        try:
            return True, self._walk(frames, height, width, interval, _no_draw)
        except _DrawNeeded:
            return False, None

    def find(self, frames: int, height: int, width: int) -> Bucket | None:
        """The bucket of exactly this shape (for records encoded ahead of time)."""
        for name in self.order:
            for level in self.levels[name]:
                for ratio, size in self.aspects[name].items():
                    if level.used and level.num_frames == frames and size == (height, width):
                        return self._bucket(level, ratio)
        return None

    def why_not(self, frames: int, height: int, width: int, *, interval: int = 1) -> str:
        """Why a clip of this shape may find no bucket, for the report before training."""
        if not (frames and height and width):
            return "unreadable"
        names = [name for name in self.order if self._large_enough(name, height, width)]
        if not names:
            return "too small for every resolution"
        levels = [level for name in names for level in self.levels[name]]
        if not any(self._fits(level, frames, interval) for level in levels):
            return "an image, and no 1-frame bucket" if frames == 1 else "too short for every length"
        return "refused by keep probabilities"

    def _walk(self, frames, height, width, interval, rng_of: Callable) -> Bucket | None:
        for name, ratio in self._candidates(height, width):
            drawn = None
            for level in self.levels[name]:
                if not self._fits(level, frames, interval):
                    continue
                # One generator a level: the first draw of a pair decides about entering, the next about keeping.
                rng = _Lazy(rng_of, level)
                if level.draws_to_enter and frames > 1 and rng.random() > level.enter:
                    continue
                drawn = level, rng
                break
            if drawn and (drawn[0].keep >= 1 or (drawn[0].keep > 0 and drawn[1].random() < drawn[0].keep)):
                level = drawn[0]
                return self._bucket(level, ratio or closest_ratio(height, width, self.aspects[name]))
        return None

    def _candidates(self, height, width):
        """Resolutions in the order to try, with the aspect ratio where that was chosen first."""
        if not height or not width:
            return
        if not self.aspect_first:
            yield from ((name, None) for name in self.order if self._large_enough(name, height, width))
            return
        value = height / width
        nearest = min(sorted(self._ratios, reverse=True), key=lambda ratio: abs(ratio - value))
        for name, ratio, size in self._ratios[nearest]:
            if size[0] <= height and size[1] <= width:
                yield name, ratio

    def _merged_ratios(self, config) -> dict[float, list]:
        """{ratio: [(resolution, its name there, size)]}, the highest first."""
        merged = {}
        for name in config:
            for ratio, size in self.aspects[name].items():
                merged.setdefault(float(ratio), []).append((name, ratio, size))
        return {ratio: sorted(found, key=lambda item: -item[2][0]) for ratio, found in merged.items()}

    def _large_enough(self, name, height, width) -> bool:
        return height * width >= self.area_tolerance * self.pixels[name]

    def _fits(self, level: Level, frames: int, interval: int) -> bool:
        if frames == 1 or level.num_frames == 1:
            return frames == level.num_frames and not self.aspect_first
        if "x" in level.resolution and level.resolution[0].isdigit():  # a size of the user's own: as long as needed
            return frames > (level.num_frames - 1) * interval
        if self.version == "2.0":
            return frames // interval >= level.num_frames
        return frames > level.num_frames * interval

    def _bucket(self, level: Level, ratio: str) -> Bucket:
        height, width = self.aspects[level.resolution][ratio]
        return Bucket(level.resolution, level.num_frames, ratio, height, width, level.batch_size)


def _level(count, resolution, frames, cell) -> Level:
    try:
        probability, batch_size = cell
        keep, enter = probability if isinstance(probability, list | tuple) else (probability, None)
        keep, enter = float(keep), None if enter is None else float(enter)
    except (TypeError, ValueError):
        raise UserError(
            f"data.buckets[{resolution!r}][{frames}]: expected (keep, batch_size) or ((keep, enter), batch_size), got {cell!r}"
        ) from None
    if keep < 0 or (enter or 0) < 0:
        raise UserError(
            f"data.buckets[{resolution!r}][{frames}]: a probability cannot be negative, got {probability!r}"
        )
    return Level(count, resolution, frames, keep, enter, batch_size)


class _DrawNeeded(Exception):
    pass


def _no_draw(level):
    raise _DrawNeeded


class _Lazy:
    """Builds the level's generator at its first draw: most levels never draw."""

    def __init__(self, make, level):
        self.make, self.level, self.rng = make, level, None

    def random(self) -> float:
        self.rng = self.rng or self.make(self.level)
        return self.rng.random()
