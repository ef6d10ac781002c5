"""Aesthetic score: CLIP ViT-L/14 and the LAION predictor (sac+logos+ava1-l14-linearMSE), mean over three frames.

    python -m data_pipelines.aesthetic --input=WORK/table.parquet --output=DIR \\
        --clip_path=clip-vit-large-patch14 --aes_path=sac+logos+ava1-l14-linearMSE.safetensors

Frames at 0.1, 0.5 and 0.9 of the clip; 5.5 is fair, 6.5 high. Without weights the stage refuses. `clip_embedding` is
the mean of the frames' unit vectors, for `dedup --embedding=clip_embedding`.
"""

import dataclasses
import sys

import numpy as np
import pyarrow as pa

from data_pipelines import entry
from data_pipelines.clip import Clip, require
from data_pipelines.decode import frames_at
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError

LAYERS = (0, 2, 4, 6, 7)  # linear layers of the published Sequential; the rest is dropout


class Aesthetic(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {"aes": pa.float64(), "clip_embedding": pa.list_(pa.float16())}
    resources = Resources(num_cpus=1, max_workers=1)
    batch_size = 16

    @dataclasses.dataclass(frozen=True)
    class Config:
        clip_path: str = ""  # folder of CLIP ViT-L/14
        aes_path: str = ""  # the predictor's weights, .safetensors or .pth
        places: tuple[float, ...] = (0.1, 0.5, 0.9)  # of the frames, as shares of the length
        num_gpus: float = 0.0  # of a worker, under Ray

    @classmethod
    def check(cls, config):
        require(config.clip_path, "clip_path", "the aesthetic score")
        require(config.aes_path, "aes_path", "the aesthetic score")

    def __init__(self, config):
        super().__init__(config)
        self.clip = Clip(config.clip_path)
        self.head = head(config.aes_path)

    def rows(self, rows):
        made, pictures, owners = [], [], []
        for row in rows:
            total = row["num_frames"]
            numbers = [min(total - 1, int(place * total)) for place in sorted(self.config.places)]
            try:
                images = frames_at(row["path"], numbers, longer=640)
            except (OSError, ValueError) as error:
                made.append({"id": row["id"], "error": f"{type(error).__name__}: {error}"[:500]})
                continue
            pictures.extend(images)
            owners.extend([row["id"]] * len(images))
        vectors = self.clip.images(pictures) if pictures else np.zeros((0, 1), np.float32)
        scores = self.score(vectors) if pictures else np.zeros(0)
        for name in dict.fromkeys(owners):
            mine = [k for k, owner in enumerate(owners) if owner == name]
            embedding = vectors[mine].mean(axis=0).astype(np.float16)
            made.append({"id": name, "aes": float(scores[mine].mean()), "clip_embedding": embedding})
        return made

    def score(self, vectors: np.ndarray) -> np.ndarray:
        for weight, bias in self.head:  # linear all the way: the predictor has no activations
            vectors = vectors @ weight.T + bias
        return vectors[:, 0]


def head(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The predictor's layers from .safetensors, or from the published .pth (needs torch)."""
    if path.endswith(".safetensors"):
        from safetensors.numpy import load_file

        state = load_file(path)
    else:
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f'{path} is a pickle: install torch ("opensora-jax[convert]") or give .safetensors'
            ) from error
        state = {k: v.numpy() for k, v in torch.load(path, map_location="cpu", weights_only=True).items()}
    try:
        return [(state[f"layers.{k}.weight"], state[f"layers.{k}.bias"]) for k in LAYERS]
    except KeyError as error:
        raise UserError(f"{path} is not the LAION aesthetic predictor: it lacks {error}") from error


STAGE = Aesthetic

if __name__ == "__main__":
    sys.exit(entry.stage(Aesthetic))
