"""Checks that need no weights: sharpness, colour, exposure, black bars, frozen and black clips.

    python -m data_pipelines.quality --input=WORK/table.parquet --output=DIR

These are classical measures under their own names; none of them is an aesthetic score.
"""

import dataclasses
import sys

import numpy as np
import pyarrow as pa

from data_pipelines import entry
from data_pipelines.decode import frames_at, spread
from data_pipelines.flow import gray
from data_pipelines.stage import Stage


class Quality(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {
        "sharpness": pa.float64(),  # variance of the Laplacian at 256 pixels, median over frames
        "colorfulness": pa.float64(),  # Hasler and Süsstrunk 2003
        "luma": pa.float64(),  # mean brightness 0 … 255
        "clipped": pa.float64(),  # share of pixels that are blown out or crushed
        "black_bars": pa.float64(),  # share of the picture taken by black borders
        "change": pa.float64(),  # mean absolute difference of sampled frames: near 0 is frozen
        "black": pa.bool_(),
        "frozen": pa.bool_(),
    }

    @dataclasses.dataclass(frozen=True)
    class Config:
        frames: int = 8  # looked at in each clip
        black_luma: float = 20.0  # a clip whose sampled frames are all darker is black
        frozen_change: float = 0.35  # a clip that changes less is frozen

    def row(self, row):
        images = frames_at(row["path"], spread(row["num_frames"], self.config.frames), longer=256)
        greys = np.stack([gray(image) for image in images])
        luma = greys.mean(axis=(1, 2))
        change = float(np.abs(np.diff(greys.astype(np.int16), axis=0)).mean()) if len(greys) > 1 else None
        black = bool((luma < self.config.black_luma).all())
        return {
            "sharpness": float(np.median([sharpness(grey) for grey in greys])),
            "colorfulness": float(np.median([colorfulness(image) for image in images])),
            "luma": float(luma.mean()),
            "clipped": float(((greys < 4) | (greys > 251)).mean()),
            "black_bars": 0.0 if black else bars(greys),
            "change": change,
            "black": black,
            "frozen": None if change is None else bool(change < self.config.frozen_change),
        }


def sharpness(grey: np.ndarray) -> float:
    import cv2

    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def colorfulness(image: np.ndarray) -> float:
    red, green, blue = image.reshape(-1, 3).astype(np.float64).T
    one, two = red - green, (red + green) / 2 - blue
    return float(np.hypot(one.std(), two.std()) + 0.3 * np.hypot(one.mean(), two.mean()))


def bars(greys: np.ndarray, level: int = 24) -> float:
    """Share of the picture outside the smallest box that holds everything brighter than `level` in any frame."""
    bright = greys.max(axis=0)
    rows = np.flatnonzero(np.percentile(bright, 95, axis=1) > level)
    columns = np.flatnonzero(np.percentile(bright, 95, axis=0) > level)
    if not len(rows) or not len(columns):
        return 1.0
    inside = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return float(1 - inside / bright.size)


STAGE = Quality

if __name__ == "__main__":
    sys.exit(entry.stage(Quality))
