"""Still pictures out of clips: chosen frames as image files, one row each, for image training and image captioners.

python -m data_pipelines.frames --input=WORK/table.parquet --output=DIR [--places=0.1,0.5,0.9]
"""

import dataclasses
import sys

import pyarrow as pa

from data_pipelines import entry, files
from data_pipelines.decode import frames_at, shrink
from data_pipelines.probe import MEASURED
from data_pipelines.stage import Stage
from opensora_jax.common.errors import UserError


class Frames(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {"path": pa.string(), **MEASURED, "frame": pa.int64(), "source_path": pa.string()}
    forgets = ("status", "reason", "codec", "rotation", "variable_rate", "odd_size", "audio")
    makes_rows = True

    @dataclasses.dataclass(frozen=True)
    class Config:
        folder: str = ""  # for the stills; the runner fills it in
        places: tuple[float, ...] = (0.5,)  # shares of the clip's length
        shorter: int = 0  # scale the shorter side down to this; 0: as it is
        format: str = "jpg"  # or png

    @classmethod
    def check(cls, config):
        if config.format not in ("jpg", "png") or not all(0 <= place <= 1 for place in config.places):
            raise UserError("frames: format is jpg or png, and places are shares between 0 and 1")

    def row(self, row):
        from PIL import Image

        total = row["num_frames"]
        numbers = sorted({min(total - 1, int(place * total)) for place in self.config.places})
        made = []
        for number, image in zip(numbers, frames_at(row["path"], numbers)):
            image = shrink(image, self.config.shorter)
            name = files.digest(row["id"], "frame", number)
            path = files.join(self.config.folder, name[:2], f"{name}.{self.config.format}")
            with files.replacing(path) as local:
                Image.fromarray(image).save(local, quality=95)
                size = files.size(local)
            height, width = image.shape[:2]
            shape = {"height": height, "width": width, "aspect_ratio": height / width, "resolution": height * width}
            facts = {"path": path, "num_frames": 1, "filesize": size, "frame": number, "source_path": row["path"]}
            made.append({"id": name, **facts, **shape})
        return made


STAGE = Frames

if __name__ == "__main__":
    sys.exit(entry.stage(Frames))
