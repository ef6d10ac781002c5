"""The report on a data set: counts, buckets, pictures."""

import shutil

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data.inspect import main


def test_a_folder_of_shards(shards, tmp_path, capsys):
    assert main([f"--source={shards}", f"--output={tmp_path}", "--config.data.buckets={'32x32': {17: (1.0, 5)}}"]) == 0
    said = capsys.readouterr().out
    for words in (
        "48 clips (pixels), 0 unreadable",
        "0 images, 48 videos",
        "32x32 x 48",
        "8 fps x 48",
        "9 steps an epoch",
    ):
        assert words in said
    from PIL import Image

    for name in ("histogram.png", "samples.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5


def test_the_buckets_of_a_shipped_config(capsys):
    assert main(["--config=configs/stage3.py", "--source=shapes:train?count=64"]) == 0
    said = capsys.readouterr().out
    assert "empty: no clip is assigned here" in said and "64 too small for every resolution" in said


def test_nothing_named():
    with pytest.raises(UserError, match="name a data set"):
        main([])


def test_shards_are_compared_with_their_checksums(shards, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    assert main([f"--source={folder}", "--verify"]) == 0
    assert "shards are as they were written" in capsys.readouterr().out
    path = next(folder.glob("*.array_record"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"not as they were written, or gone: {path.name}"):
        main([f"--source={folder}", "--verify"])
    with pytest.raises(UserError, match=r"has no manifest\.json to check against"):
        main(["--source=shapes:train?count=64", "--verify"])
