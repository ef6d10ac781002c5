"""The loop of a real user: a folder of own clips with a CSV → look → fine-tune the shipped pipeline → export → sample.

The commands are those of docs/quickstart.md, in its order; only the run is shortened.
"""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from opensora_jax import locate
from opensora_jax.data.video_io import probe

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
SHORT = ("--config.steps=2", "--config.data.batch_size=1", "--config.log.tensorboard=False", "--export_dtype=float32")


def commands() -> list[list[str]]:
    block = next(block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "clips.csv" in block)
    return [shlex.split(line)[2:] for line in block.splitlines()]


def test_from_own_clips_to_own_videos(own_clips, monkeypatch, capsys):
    monkeypatch.chdir(own_clips)

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module, *flags])
        assert importlib.import_module(module).main() == 0
        return capsys.readouterr()

    look, train, sample = commands()
    said = run(*look)
    assert "21 clips (pixels), 1 unreadable" in said.out and (own_clips / "runs/mine/report/samples.png").exists()

    said = run(*train, *SHORT)
    assert "1 unreadable" in said.err and "started from the weights of tiny" in said.err
    made, base = own_clips / "runs/mine/pipeline", locate.find("tiny")
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
