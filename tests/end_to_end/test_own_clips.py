"""The loop of a real user: a folder of own clips with a CSV → look → fine-tune the shipped pipeline → export → sample.

The commands are those of docs/quickstart.md, in its order; only the run is shortened.
"""

import csv
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from opensora_jax import locate
from opensora_jax.data.video_io import probe, write_video

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
SHORT = ("--config.steps=2", "--config.data.batch_size=1", "--config.log.tensorboard=False", "--export_dtype=float32")


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


def commands() -> list[list[str]]:
    block = next(block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "clips.csv" in block)
    return [shlex.split(line)[2:] for line in block.splitlines()]


def test_from_own_clips_to_own_videos(own_clips, shipped, monkeypatch, capsys):
    monkeypatch.chdir(own_clips)

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module, *flags])
        assert importlib.import_module(module).main() == 0
        return capsys.readouterr()

    look, train, sample = commands()
    said = run(*look)
    assert "21 clips (pixels), 1 unreadable" in said.out and (own_clips / "runs/mine/report/samples.png").exists()

    where = () if shipped == "tiny" else (f"--config.pipeline={shipped}", f"--config.init_from={shipped}")
    said = run(*train, *SHORT, *where)
    assert "1 unreadable" in said.err and f"started from the weights of {shipped}" in said.err
    made, base = own_clips / "runs/mine/pipeline", locate.find(shipped)
    weights = lambda folder, part: load_file(next((folder / part).glob("*.safetensors")))
    before, after = weights(base, "denoiser"), weights(made, "denoiser")
    moved = [np.abs(np.float32(after[name]) - np.float32(before[name])).max() for name in before]
    assert 0 < max(moved) < 0.05  # a few steps from where it began, not from scratch
    for name, array in weights(base, "vae").items():
        np.testing.assert_array_equal(np.float32(weights(made, "vae")[name]), np.float32(array))

    run(*sample, "--steps=2", "--no-gif")
    (video,) = (own_clips / "outputs").glob("*.mp4")
    info = probe(video)
    assert (info.num_frames, info.height, info.width) == (17, 32, 32)
    assert json.loads(video.with_suffix(".json").read_text())["from"] == "runs/mine/pipeline"
