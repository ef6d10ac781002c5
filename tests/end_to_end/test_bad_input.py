"""docs/troubleshooting.md, row by row: each mistake is made through a public entry, and must end in that very line,
with exit code 2 and no traceback; `--debug` shows one."""

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from opensora_jax import encode, sample, train
from opensora_jax.common.aspect import image_size
from opensora_jax.common.errors import UserError, guarded
from opensora_jax.data import inspect
from opensora_jax.data.loader import DataConfig, make_loader
from opensora_jax.data.video_io import write_video
from opensora_jax.pipeline import SamplingConfig, check_sampling
from opensora_jax.training.checkpoint import CheckpointConfig, Checkpoints
from tests.end_to_end.conftest import COMMON

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "troubleshooting.md").read_text()
ROWS = dict(re.findall(r"^\| (.+?) \| `+ ?(.+?) ?`+ \|.*\|$", PAGE.split("## While training")[0], re.MULTILINE))

# Mistake → the command that makes it, in a folder with what `folder` puts there.
TRAIN = f"train {' '.join(COMMON)} --workdir=run"
COMMANDS = {
    "a table without rows": f"{TRAIN} --config.data.source=empty.csv",
    "a clip without a caption": f"{TRAIN} --config.data.source=silent.csv",
    "a column is missing": f"{TRAIN} --config.data.source=untitled.csv",
    "a column holds no numbers": f"{TRAIN} --config.data.source=words.csv",
    "the data set is not there": f"{TRAIN} --config.data.source=clips.cvs",
    "a resolution that no table has": f"{TRAIN} --config.data.source=clips.csv --config.data.buckets={{'145p':{{17:(1.0,1)}}}}",
    "a cell of the bucket table is wrong": f"{TRAIN} --config.data.source=clips.csv --config.data.buckets={{'16x16':{{5:4}}}}",
    "no clip fits a bucket": f"{TRAIN} --config.data.source=clips.csv --config.data.buckets={{'16x16':{{5:(1.0,1)}},'240p':{{51:(1.0,1)}}}}",
    "pixels, but no VAE": f"{TRAIN} --config.data.source=clips.csv --config.data.buckets={{'16x16':{{5:(1.0,1)}}}}",
    "the workdir cannot be written": "train --config=configs/debug.py --workdir=/proc/run",
    "no workdir": "train --config=configs/debug.py",
    "a misspelt config": "train --config=configs/debgu.py --workdir=run",
    "a misspelt key": "train --config=configs/debug.py --workdir=run --config.stepz=3",
    "a value of the wrong type": "train --config=configs/debug.py --workdir=run --config.steps=many",
    "a misspelt flag": "train --config=configs/debug.py --workdri=run",
    "an empty line in a prompt file": "sample --prompt_file=prompts.txt",
    "an empty prompt file": "sample --prompt_file=nothing.txt",
    "no prompt": "sample",
    "a size that does not fit": "sample --prompt=a --height=31 --width=32",
    "no frames": "sample --prompt=a --num_frames=0",
    "a size given twice": "sample --prompt=a --resolution=240p --height=32",
    "a pipeline that is not there": "sample --prompt=a --from=./tiny2",
    "a folder that is no pipeline": "sample --prompt=a --from=clips",
    "a step of no run": "sample --prompt=a --from=clips@500",
    "nowhere to write videos": "sample --prompt=a --out=/proc/videos",
    "latents are encoded again": "encode --config=configs/debug.py --out=again --config.data.source=LATENTS",
    "nothing to look at": "data.inspect",
}
# These need more than a command: a run that goes on, and a disk of their own.
ELSEWHERE = {"a clip cannot be decoded", "many clips cannot be decoded", "the disk is full"}
ENTRIES = {"train": train, "sample": sample, "encode": encode, "data.inspect": inspect}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips, good and broken; tables that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "clips").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    for i in range(10):
        write_video(folder / "clips" / f"{i}.mp4", frames, fps=8)
    for i in range(6):
        whole = (folder / "clips" / f"{i}.mp4").read_bytes()
        (folder / "clips" / f"broken{i}.mp4").write_bytes(whole[:100])
    good = [f"clips/{i}.mp4,a clip,8,16,16,8" for i in range(10)]
    broken = [f"clips/broken{i}.mp4,a clip,8,16,16,8" for i in range(6)]
    head = "path,text,num_frames,height,width,fps"
    tables = {
        "clips": [head, *good],
        "one_broken": [head, *good, broken[0]],
        "broken": [head, *good, *broken],
        "empty": [],
        "silent": [head, good[0], "clips/1.mp4,,8,16,16,8"],
        "untitled": ["path,caption", "clips/0.mp4,a clip"],
        "words": [head, "clips/0.mp4,a clip,eight,16,16,8"],
    }
    for name, lines in tables.items():
        (folder / f"{name}.csv").write_text("".join(line + "\n" for line in lines))
    (folder / "prompts.txt").write_text("a red circle\n\na blue square\n")
    (folder / "nothing.txt").write_text("")
    return folder


@pytest.fixture
def say(folder, monkeypatch, capsys, request):
    """Gives a command to its entry; returns the exit code and what it wrote on stderr."""
    monkeypatch.chdir(folder)

    def run(command: str, *more: str):
        if "LATENTS" in command:
            command = command.replace("LATENTS", str(request.getfixturevalue("latents")))
        entry, *flags = command.split(" ")
        monkeypatch.setattr(sys, "argv", [entry, *flags, *more])
        code = guarded(ENTRIES[entry].main)
        return code, capsys.readouterr().err

    return run


def test_the_page_and_the_commands_are_of_the_same_mistakes():
    assert ROWS.keys() == COMMANDS.keys() | ELSEWHERE


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_is_the_line_of_the_page(mistake, say, latents):
    code, said = say(COMMANDS[mistake])
    assert code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].replace(str(latents), "LATENTS") == f"error: {ROWS[mistake]}"


def test_debug_shows_the_traceback(say):
    code, said = say(COMMANDS["a column is missing"], "--debug")
    assert code == 2 and "Traceback" in said and "in _read_table" in said
    assert said.splitlines()[-1] == f"error: {ROWS['a column is missing']}"


def test_a_broken_clip_is_skipped_and_many_end_the_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    data = DataConfig(source="one_broken.csv", batch_size=11, num_frames=5, height=16, width=16, max_bad_share=0.2)
    loader = make_loader(data)
    batch, info = next(loader)
    assert len(batch["text"]) == 11 and [name for name, _ in info.bad] == ["clips/broken0.mp4"]
    assert capsys.readouterr().err.splitlines() == [ROWS["a clip cannot be decoded"]]

    loader = make_loader(replace(data, source="broken.csv", batch_size=16, max_bad_share=0.02))
    with pytest.raises(UserError) as error:
        next(loader)
    line, _, names = str(error.value).rpartition(": ")
    assert re.sub(r"\d+ of \d+", "6 of 16", f"{line}: NAMES") == ROWS["many clips cannot be decoded"]
    assert "clips/broken" in names


def test_sizes_that_1_x_trained_at_are_taken_though_no_vae_divides_them():
    by_eight = SimpleNamespace(takes=(), latent_size=lambda frames, height, width: (frames, height // 8, width // 8))
    size = lambda height, width: SamplingConfig(height=height, width=width)
    check_sampling(size(*image_size("240p", "9:16")), by_eight)  # 240 x 426
    with pytest.raises(UserError, match="nearest: 240x432"):
        check_sampling(size(240, 430), by_eight)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float):
    """A file system of its own, where this user may mount one."""
    folder.mkdir()
    size = f"size={int(megabytes * 2**20)}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_whole_checkpoints_only(tmp_path, latents):
    """A real ENOSPC below Orbax, in a process of its own, because its threads outlive the failure."""
    with small_disk(tmp_path / "disk", 5) as disk:
        flags = [*COMMON, f"--config.data.source={latents}", "--config.steps=40", "--config.checkpoint.every_steps=1"]
        command = [sys.executable, "-m", "opensora_jax.train", *flags, "--config.checkpoint.keep=0"]
        command.append(f"--workdir={disk / 'run'}")
        env = os.environ | {"XLA_FLAGS": ""}
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
        folder = disk / "run" / "checkpoints"
        saved = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        wanted = f"error: {ROWS['the disk is full']}".replace("DIR", str(folder)).replace("step N", f"step {saved[-1]}")
        assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [wanted]
        assert done.stderr.splitlines()[-1] == wanted

        assert any(not path.name.isdigit() for path in folder.iterdir())  # something was half written
        assert Checkpoints(disk / "run", CheckpointConfig()).steps() == saved  # and the next run does not take it
