"""How well the caption fits: CLIP's logit (about 100 × cosine) of the text and the middle frame.

    python -m data_pipelines.match --input=WORK/table.parquet --output=DIR --clip_path=clip-vit-large-patch14

Without weights the stage refuses. A row without a caption has no score.
"""

import dataclasses
import sys

import pyarrow as pa

from data_pipelines import entry
from data_pipelines.clip import Clip, require
from data_pipelines.decode import frames_at
from data_pipelines.stage import Resources, Stage


class Match(Stage):
    columns_in = ("path", "num_frames", "text")
    columns_out = {"match": pa.float64()}
    resources = Resources(num_cpus=1, max_workers=1)

    @dataclasses.dataclass(frozen=True)
    class Config:
        clip_path: str = ""  # folder of CLIP ViT-L/14
        num_gpus: float = 0.0  # of a worker, under Ray

    @classmethod
    def check(cls, config):
        require(config.clip_path, "clip_path", "the text-video match")

    def __init__(self, config):
        super().__init__(config)
        self.clip = Clip(config.clip_path)

    def rows(self, rows):
        made, wanted, pictures = [], [], []
        for row in rows:
            if not row["text"]:
                made.append({"id": row["id"]})
                continue
            try:
                pictures.append(frames_at(row["path"], [row["num_frames"] // 2], longer=640)[0])
                wanted.append(row)
            except (OSError, ValueError) as error:
                made.append({"id": row["id"], "error": f"{type(error).__name__}: {error}"[:500]})
        if wanted:
            pairs = zip(wanted, self.clip.images(pictures), self.clip.texts([row["text"] for row in wanted]))
            made.extend({"id": row["id"], "match": self.clip.logit_scale * float(a @ b)} for row, a, b in pairs)
        return made


STAGE = Match

if __name__ == "__main__":
    sys.exit(entry.stage(Match))
