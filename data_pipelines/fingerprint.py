"""Perceptual hashes of a clip, for dedup: a 64-bit DCT hash of each of four frames.

    python -m data_pipelines.fingerprint --input=WORK/table.parquet --output=DIR

A hash bit is the sign of a low frequency against the median. A picture without content (black, one colour) has no
hash: its bits would be noise, and two of them would match by chance.
"""

import dataclasses
import sys

import numpy as np
import pyarrow as pa

from data_pipelines import entry
from data_pipelines.decode import frames_at
from data_pipelines.flow import gray
from data_pipelines.stage import Stage

FRAMES = 4


class Fingerprint(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {"phash": pa.list_(pa.uint64(), FRAMES)}
    batch_size = 32

    @dataclasses.dataclass(frozen=True)
    class Config:
        least_contrast: float = 3.0  # standard deviation of grey levels under which a frame counts as empty

    def row(self, row):
        total = row["num_frames"]
        numbers = [min(total - 1, int((k + 0.5) * total / FRAMES)) for k in range(FRAMES)]
        greys = [gray(image) for image in frames_at(row["path"], numbers, longer=256)]
        if max(grey.std() for grey in greys) < self.config.least_contrast:
            return {"phash": None}
        return {"phash": [phash(grey) for grey in greys]}


def phash(grey: np.ndarray) -> int:
    import cv2

    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the mean brightness says nothing
    return int(np.packbits(bits).view(">u8")[0])


STAGE = Fingerprint

if __name__ == "__main__":
    sys.exit(entry.stage(Fingerprint))
