"""benchmarks/data_loading.py at its smallest: what it measures is what it says."""

import argparse

import pytest

from benchmarks import data_loading


def test_a_round_of_the_smallest_set(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loading, "MP4_SETUPS", ((2, 0),))
    args = argparse.Namespace(clips=4, frames=5, size=32, batch=2, epochs=1, torch_python=None, latents=False)
    data_loading.write_clips(tmp_path, args)
    rows = data_loading.one_round(tmp_path, args)
    assert {name.split(",")[0] for name in rows} == {
        "mp4 shards", "mp4 files", "latents of 4 MB", "raw read", "records of next to nothing",
    }  # fmt: skip
    assert {f"raw read, {memory}, 4 threads" for memory in ("fresh", "recycled", "hot")} <= rows.keys()
    latents = rows["latents of 4 MB, 1 threads"]
    assert latents["mb_per_second"] == pytest.approx(latents["clips_per_second"] * 8 * 64**3 * 2 / 1e6)
    assert data_loading.best([rows], "latents", "mb_per_second") >= latents["mb_per_second"]
    assert all(row["mb_per_second"] > 0 and row["cpu_milliseconds_per_clip"] > 0 for row in rows.values())
