"""The shipped pipeline: small, quick, and its clips show what the prompt says, also for triples it was never trained on."""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from opensora_jax import locate
from opensora_jax.data import shapes
from opensora_jax.data.video_io import read_frames
from tests.conftest import REPO
from tests.oracle import matches

FOLDER = locate.ASSETS / "tiny"


def sample(*words, out, **env):
    """The videos of the command, in order; one device and the compiler's own settings, as a user has them."""
    command = [sys.executable, "-m", "opensora_jax.sample", *words, f"--out={out}"]
    subprocess.run(command, check=True, cwd=REPO, env=os.environ | {"XLA_FLAGS": ""} | env, capture_output=True)
    return sorted(out.glob("*.mp4"))


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


@pytest.mark.parametrize(("split", "least"), [("train", 0.9), ("heldout", 0.8)])
def test_its_clips_are_right_in_every_attribute(split, least, tmp_path):
    """Twelve triples on both backgrounds, two seeds each, at default settings."""
    triples = sorted({scene.triple for scene in shapes.scenes(split)})
    triples = triples[:: len(triples) // 12][:12]
    texts = [shapes.Scene(*triple, ground).caption for triple in triples for ground in shapes.BACKGROUNDS]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    videos = sample(f"--prompt_file={tmp_path / 'prompts.txt'}", "--num_samples=2", "--no-gif", out=tmp_path / "out")
    texts = np.repeat(texts, 2)
    right = [all(matches(read_frames(video), text).values()) for video, text in zip(videos, texts, strict=True)]
    assert len(right) == 48 and np.mean(right) >= least, [text for text, ok in zip(texts, right) if not ok]


def pace():
    """How much longer a second's work takes here and now than on a quiet core of the machine that the limit was set on."""
    began = time.process_time()
    sum(i * i for i in range(10_000_000))
    return (time.process_time() - began) / 0.65


def test_one_clip_takes_under_twenty_seconds_from_the_command_line(tmp_path):
    """Counted in seconds of a core, start and compilation included, so that other tests beside this one matter little, and at
    the pace of the machine, which its neighbours may slow by half; twice where a virtual machine is still being given its memory,
    whose first touch takes six times the second and counts as the program's."""
    seconds = []
    while not seconds or (len(seconds) < 2 and seconds[0] >= 20):
        folder = tmp_path / str(len(seconds))
        before, slower = resource.getrusage(resource.RUSAGE_CHILDREN), pace()
        nothing_compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        (video,) = sample("--prompt=a red circle moving left", out=folder / "out", **nothing_compiled)
        after, slower = resource.getrusage(resource.RUSAGE_CHILDREN), max(1.0, slower, pace())
        seconds.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / slower)
    assert min(seconds) < 20, seconds
    assert len(read_frames(video)) == 17
