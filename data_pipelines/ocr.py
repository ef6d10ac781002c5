"""Text in the picture: boxes with a score over 0.3 (the originals' `ocr`) and the share of the picture they cover.

    python -m data_pipelines.ocr --input=WORK/table.parquet --output=DIR

Detection only, with the PaddleOCR detector that ships inside rapidocr, on a few frames at 480 pixels. The originals
counted boxes on one frame; here the frame with the most text decides. On texture without objects the detector may call
the whole picture one line of text; a single box over `largest` is therefore not counted.
"""

import dataclasses
import sys
import threading

import numpy as np
import pyarrow as pa

from data_pipelines import entry
from data_pipelines.decode import frames_at, spread
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError


class Ocr(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {"ocr": pa.int64(), "ocr_area": pa.float64()}
    resources = Resources(num_cpus=1)
    batch_size = 4

    @dataclasses.dataclass(frozen=True)
    class Config:
        frames: int = 3  # looked at in each clip
        side: int = 480  # longer side of the frames, in pixels
        score: float = 0.3  # of a box that counts
        largest: float = 0.35  # share of the picture

    @classmethod
    def check(cls, config):
        try:
            import rapidocr  # noqa: F401
        except ImportError as error:
            raise UserError('the ocr stage needs rapidocr: pip install "opensora-jax[data]"') from error

    def __init__(self, config):
        super().__init__(config)
        self.detector = build(config.side)
        self.lock = threading.Lock()  # the engine keeps the last picture's size in itself

    def row(self, row):
        found = []
        for image in frames_at(row["path"], spread(row["num_frames"], self.config.frames)):
            image = enlarged(image, self.config.side)
            with self.lock:
                result = self.detector(image[..., ::-1])
            pairs = [] if result.boxes is None else list(zip(list(result.boxes), list(result.scores)))
            boxes = [np.asarray(box, np.float32) for box, score in pairs if score > self.config.score]
            boxes = [box for box in boxes if covered([box], image.shape[:2]) <= self.config.largest]
            found.append((len(boxes), covered(boxes, image.shape[:2])))
        return {"ocr": max(count for count, _ in found), "ocr_area": max(area for _, area in found)}


def build(side: int):
    from rapidocr import RapidOCR

    params = {
        "Global.log_level": "error",
        "Global.use_cls": False,
        "Global.use_rec": False,
        "Det.limit_side_len": side,
        "Det.limit_type": "max",
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=params)


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """The longer side at exactly `side`: the detector misses text in thumbnails."""
    import cv2

    scale = side / max(image.shape[:2])
    size = max(32, round(image.shape[1] * scale)), max(32, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def covered(boxes: list[np.ndarray], shape: tuple[int, int]) -> float:
    import cv2

    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        cv2.fillPoly(mask, [box.round().astype(np.int32)], 1)
    return float(mask.mean())


STAGE = Ocr

if __name__ == "__main__":
    sys.exit(entry.stage(Ocr))
