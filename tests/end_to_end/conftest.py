"""Runs of the public debug configuration on latents made here, so that no encoder has to be compiled; and a
user's own clips."""

import csv

import numpy as np
import pytest

from opensora_jax.data.records import ShardWriter, write_manifest
from opensora_jax.data.video_io import write_video

COMMON = (
    "--config=configs/debug.py",
    "--config.vae=None",
    "--config.text_encoder=None",
    "--config.text.tokenizer=",
    "--config.log.sample_every_steps=0",
    "--config.log.tensorboard=False",
    "--config.log.every_steps=1",
    "--config.data.batch_size=1",  # a device: the suite has eight
)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """48 records of two shapes: 17 and 33 frames at 32 x 32."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, records_per_shard=16) as writer:
        for i in range(48):
            frames = 5 if i % 3 else 10
            writer.write(
                {
                    "id": f"clip-{i}",
                    "text": "a clip",
                    "num_frames": 17 if i % 3 else 34,
                    "fps": 8.0,
                    "height": 32,
                    "width": 32,
                    "latents": rng.standard_normal((frames, 8, 8, 4), np.float32),
                    "text_emb": rng.standard_normal((16, 32), np.float32),
                    "text_mask": (np.arange(16) < 4 + i % 8).astype(np.int32),
                }
            )
    write_manifest(folder)
    return folder


@pytest.fixture
def run_flags(latents):
    """Flags of one run: a function of its folder and further settings."""

    def flags(workdir, **settings):
        extra = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return [*COMMON, f"--config.data.source={latents}", f"--workdir={workdir}", *extra]

    return flags


@pytest.fixture
def own_clips(tmp_path):
    """Twenty clips of a bar that sweeps over a gradient, of three sizes, and a file that is no video."""
    (tmp_path / "clips").mkdir()
    rows = [{"path": "clips/notes.mp4", "text": "not a video at all"}]
    (tmp_path / "clips" / "notes.mp4").write_text("to do: film the cat")
    for i in range(20):
        height, width = ((48, 64), (64, 48), (40, 40))[i % 3]
        frames = np.zeros((20, height, width, 3), np.uint8)
        frames[..., i % 3] = np.linspace(0, 200, width).astype(np.uint8)
        for t in range(20):
            at = (t * 2 + i) % (width - 6)
            frames[t, :, at : at + 6] = 255
        write_video(tmp_path / "clips" / f"{i:02d}.mp4", frames, fps=10)
        rows.append(
            {"path": f"clips/{i:02d}.mp4", "text": f"a white bar over a {('red', 'green', 'blue')[i % 3]} wall"}
        )
    with open(tmp_path / "clips.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path
