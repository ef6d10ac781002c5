"""Motion score: mean optical flow, by both historic definitions, with DIS (OpenCV) in place of UniMatch.

    python -m data_pipelines.flow --input=WORK/table.parquet --output=DIR

`flow_v12`: frames 0 10 20 30, mean |component| (1.1, 1.2). `flow_v13`: frames 0 15 … 135, mean L2 norm (1.3). Both are
in pixels of the originals' 320×576 grid (portrait frames turned), whatever grid the flow is computed on; a short clip
uses the frames it has. `flow` is the one named by `definition`. DIS is not UniMatch: `flow_method` says what made the
numbers, and thresholds should be taken from your own percentiles (data_pipelines.analyze prints them).
"""

import dataclasses
import itertools
import sys
import threading

import numpy as np
import pyarrow as pa

from data_pipelines import entry
from data_pipelines.decode import frames_at
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError

GRID = (320, 576)  # of the originals
FRAMES = {"v12": range(0, 31, 10), "v13": range(0, 136, 15)}


class Flow(Stage):
    columns_in = ("path", "num_frames", "width", "height")
    columns_out = {
        "flow": pa.float64(),
        "flow_v12": pa.float64(),
        "flow_v13": pa.float64(),
        "flow_x": pa.float64(),  # median vector a frame, in pixels of the 320×576 grid: where the picture goes
        "flow_y": pa.float64(),
        "flow_method": pa.string(),
    }
    resources = Resources(num_cpus=1)

    @dataclasses.dataclass(frozen=True)
    class Config:
        definition: str = "v13"  # which of the two becomes flow: v12 or v13
        compute_height: int = 240  # rows of the grid that DIS works on; smaller is faster

    @classmethod
    def check(cls, config):
        if config.definition not in FRAMES:
            raise UserError(f"flow.definition must be v12 or v13, not {config.definition}")

    def row(self, row):
        total = row["num_frames"]
        if total < 2:
            return {"flow_method": "none: one frame"}
        plans = {name: chosen(frames, total) for name, frames in FRAMES.items()}
        portrait = row["height"] > row["width"]
        short = min(row["height"], row["width"])
        rows = int(min(self.config.compute_height, max(120, short)))
        size = (rows, round(rows * GRID[1] / GRID[0]))
        numbers = sorted(set().union(*plans.values()))
        images = frames_at(row["path"], numbers, size=size[::-1] if portrait else size)
        grey = {n: gray(image.transpose(1, 0, 2) if portrait else image) for n, image in zip(numbers, images)}
        scale = np.array([GRID[1] / size[1], GRID[0] / size[0]], np.float32)
        fields = {pair: field(grey[pair[0]], grey[pair[1]]) * scale for plan in plans.values() for pair in pairs(plan)}
        v12 = np.mean([np.abs(fields[pair]).mean() for pair in pairs(plans["v12"])])
        v13 = np.mean([np.linalg.norm(fields[pair], axis=-1).mean() for pair in pairs(plans["v13"])])
        steps = [np.median(fields[p].reshape(-1, 2), axis=0) / (p[1] - p[0]) for p in pairs(plans["v12"])]
        x, y = np.median(steps, axis=0)[::-1] if portrait else np.median(steps, axis=0)
        scores = {"flow_v12": float(v12), "flow_v13": float(v13)}
        best = scores[f"flow_{self.config.definition}"]
        return {**scores, "flow": best, "flow_x": float(x), "flow_y": float(y), "flow_method": f"dis-medium-{size[0]}"}


def chosen(frames: range, total: int) -> list[int]:
    kept = [n for n in frames if n < total]
    return kept if len(kept) > 1 else [0, total - 1]


def pairs(numbers: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(numbers))


def gray(image: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)


_local = threading.local()


def field(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense flow [H, W, 2] (x, y) in pixels from `first` to `second` (grey). A DIS object belongs to one thread."""
    import cv2

    if not hasattr(_local, "dis"):
        cv2.setNumThreads(1)
        _local.dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return _local.dis.calc(first, second, None)


STAGE = Flow

if __name__ == "__main__":
    sys.exit(entry.stage(Flow))
