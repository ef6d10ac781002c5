"""Camera motion from the dense flow field: pan left/right, tilt up/down, zoom in/out, static, undetermined.

    python -m data_pipelines.camera_motion --input=WORK/table.parquet --output=DIR

A pair of frames gives a field; a robust fit of translation + zoom + roll, weighted by texture (where there is none,
flow is a guess), tells the camera from things that move in front of it. Pairs vote. The words are those of 1.2 and 1.3.
"""

import collections
import dataclasses
import sys

import numpy as np
import pyarrow as pa

from data_pipelines import entry
from data_pipelines.decode import frames_at
from data_pipelines.flow import field, gray
from data_pipelines.stage import Resources, Stage


class CameraMotion(Stage):
    columns_in = ("path", "num_frames", "fps", "height", "width")
    columns_out = {
        "cmotion": pa.string(),
        "cmotion_agreement": pa.float64(),  # share of pairs that said so
        "camera_x": pa.float64(),  # camera travel a second, in shares of the shorter side; right and down are positive
        "camera_y": pa.float64(),
        "camera_zoom": pa.float64(),  # magnification a second, as a logarithm; in is positive
    }
    resources = Resources(num_cpus=1)

    @dataclasses.dataclass(frozen=True)
    class Config:
        pairs: int = 6  # of frames that vote
        step_seconds: float = 0.1  # between the frames of a pair
        static_speed: float = 0.05  # slower than this share of the shorter side a second is static
        least_inliers: float = 0.5  # share of the picture that must follow the camera
        least_agreement: float = 0.5  # share of the pairs; with less the motion is undetermined

    def row(self, row):
        config, total, fps = self.config, row["num_frames"], row["fps"] or 24.0
        if total < 2:
            return {"cmotion": "static", "cmotion_agreement": 1.0, "camera_x": 0.0, "camera_y": 0.0, "camera_zoom": 0.0}
        step = min(max(1, round(config.step_seconds * fps)), total - 1)
        count = min(config.pairs, total - step)
        starts = [int(k * (total - step) / count) for k in range(count)]
        numbers = sorted({n for s in starts for n in (s, s + step)})
        scale = min(1.0, 180 / min(row["height"], row["width"]))
        size = round(row["height"] * scale), round(row["width"] * scale)
        grey = dict(zip(numbers, map(gray, frames_at(row["path"], numbers, size=size))))
        moves = [camera(grey[s], grey[s + step]) for s in starts]
        rate = fps / step
        votes = [self.word(move, rate) for move in moves]
        word, count = collections.Counter(votes).most_common(1)[0]
        share = count / len(votes)
        x, y, zoom, _ = np.median(moves, axis=0) * [rate, rate, rate, 1]
        word = word if share > config.least_agreement else "undetermined"
        speeds = {"camera_x": float(x), "camera_y": float(y), "camera_zoom": float(zoom)}
        return {"cmotion": word, "cmotion_agreement": share, **speeds}

    def word(self, move: np.ndarray, rate: float) -> str:
        x, y, zoom, inliers = move
        if inliers < self.config.least_inliers:
            return "undetermined"
        speeds = {"pan": abs(x) * rate, "tilt": abs(y) * rate, "zoom": abs(zoom) * rate / 2}
        kind = max(speeds, key=speeds.get)
        if speeds[kind] < self.config.static_speed:
            return "static"
        positive = bool({"pan": x, "tilt": y, "zoom": zoom}[kind] > 0)
        return kind + " " + {"pan": ("left", "right"), "tilt": ("up", "down"), "zoom": ("out", "in")}[kind][positive]


def camera(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(travel x, travel y, log zoom, inlier share) between two grey frames; travel in shares of the shorter side."""
    flow = field(first, second)
    height, width = first.shape
    side = min(height, width)
    slope = np.hypot(*np.gradient(first.astype(np.float32)))
    y, x = np.mgrid[0:height:4, 0:width:4]
    moved = flow[::4, ::4].reshape(-1, 2).astype(np.float64)
    trust = (slope[::4, ::4] > 2.0).ravel().astype(np.float64)
    if trust.mean() < 0.02:
        return np.array([0.0, 0.0, 0.0, 0.0])  # no texture: nothing can be said
    place = np.stack([x.ravel() - (width - 1) / 2, y.ravel() - (height - 1) / 2], axis=1)
    one, none = np.ones(len(place)), np.zeros(len(place))
    rows_x = np.stack([one, none, place[:, 0], -place[:, 1]], axis=1)  # translation, zoom, roll
    rows_y = np.stack([none, one, place[:, 1], place[:, 0]], axis=1)
    model = np.array([*np.median(moved[trust > 0], axis=0), 0.0, 0.0])
    for _ in range(8):
        off = moved - np.stack([rows_x @ model, rows_y @ model], axis=1)
        error = np.hypot(*off.T)
        spread = max(0.3, 1.5 * float(np.median(error[trust > 0])))
        weight = trust / (1 + (error / spread) ** 2) ** 2
        system = rows_x.T @ (rows_x * weight[:, None]) + rows_y.T @ (rows_y * weight[:, None])
        right = rows_x.T @ (weight * moved[:, 0]) + rows_y.T @ (weight * moved[:, 1])
        model = np.linalg.solve(system + 1e-9 * np.eye(4), right)
    error = np.hypot(*(moved - np.stack([rows_x @ model, rows_y @ model], axis=1)).T)
    inliers = float(np.average(error < max(0.7, 0.2 * float(np.hypot(*model[:2]))), weights=trust))
    return np.array([-model[0] / side, -model[1] / side, np.log1p(max(model[2], -0.9)), inliers])


STAGE = CameraMotion

if __name__ == "__main__":
    sys.exit(entry.stage(CameraMotion))
