"""Files made uniform: container, size and rate, by exact re-encode. Every file becomes an mp4 in upright 4:2:0.

    python -m data_pipelines.resize --input=VIDEOS --output=DIR [--shorter=720 | --height=360 --width=640]

`shorter` scales the shorter side down (never up); `height` and `width` together scale to cover and cut the middle out.
Variable rates become constant, rotation is applied, odd sides lose a line.
"""

import dataclasses
import sys

import numpy as np
import pyarrow as pa

from data_pipelines import entry, files
from data_pipelines.decode import Encoder, resampled, shrink, stream
from data_pipelines.probe import MEASURED
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError


class Resize(Stage):
    columns_in = ("path", "num_frames", "fps", "variable_rate")
    columns_out = {"path": pa.string(), **MEASURED, "source_path": pa.string()}
    resources = Resources(num_cpus=1)
    batch_size = 4

    @dataclasses.dataclass(frozen=True)
    class Config:
        folder: str = ""  # for the files; the runner fills it in
        shorter: int = 0  # side in pixels; the other follows
        height: int = 0  # in pixels, with width: cut to this shape
        width: int = 0  # in pixels
        target_fps: float = 0.0  # 0: that of the source
        codec: str = "libx264"  # of the new files
        crf: int = 18  # quality: 0 loses nothing, 51 is worst
        preset: str = "medium"  # of x264: ultrafast … veryslow

    @classmethod
    def check(cls, config):
        if bool(config.height) != bool(config.width) or (config.height and config.shorter):
            raise UserError("resize: give shorter, or height and width together")

    def row(self, row):
        config = self.config
        rate = config.target_fps or row["fps"] or 24.0
        path = files.join(config.folder, row["id"][:2], f"{row['id']}.mp4")
        timed = stream(row["path"])
        images = resampled(timed, rate) if config.target_fps or row["variable_rate"] else (image for _, image in timed)
        with files.replacing(path) as local:
            with Encoder(local, rate, codec=config.codec, crf=config.crf, preset=config.preset) as encoder:
                for image in images:
                    image = (
                        covering(image, config.height, config.width) if config.height else shrink(image, config.shorter)
                    )
                    encoder.add(image)
            return {"path": path, "source_path": row["path"], **encoder.facts(files.size(local))}


def covering(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled until both sides are covered, then the middle."""
    import cv2

    scale = max(height / image.shape[0], width / image.shape[1])
    size = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


STAGE = Resize

if __name__ == "__main__":
    sys.exit(entry.stage(Resize))
