"""The whole pipeline on a corpus of known truth: cuts exact, every planted defect caught, no good clip lost."""

import collections
import itertools
import json
import os
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import pipeline, tables
from data_pipelines.pipeline import Options
from opensora_jax.common.errors import UserError
from tests.data_pipelines.steps import curation, step


def meta(output, name):
    folder = os.path.join(output, "meta", name)
    files = [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".parquet")]
    return pa.concat_tables([pq.read_table(f).replace_schema_metadata(None) for f in files]).to_pylist()


def by_source(rows):
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[row["source"]].append(row)
    return grouped


def test_probe_sees_what_each_file_is(corpus, curated):
    ids = dict(zip(*(tables.read_input(corpus[0])[c].to_pylist() for c in ("id", "source"))))
    rows = {ids[row["id"]]: row for row in meta(curated[0], "00_probe")}
    for name, facts in corpus[1].items():
        for key in ("status", "num_frames", "rotation", "variable_rate", "odd_size"):
            if key in facts:
                assert rows[name][key] == facts[key], (name, key, rows[name])
    assert rows["rotated.mp4"]["width"] < rows["rotated.mp4"]["height"], "as displayed"
    assert rows["sound.mp4"]["reason"] == "audio only"


def test_cuts_are_exact(corpus, curated):
    clips = by_source(meta(curated[0], "02_scene_cut"))
    for name, facts in corpus[1].items():
        if facts["status"] != "ok":
            assert name not in clips
            continue
        spans = sorted((row["start_frame"], row["end_frame"]) for row in clips[name])
        total = facts["num_frames"]
        if "fade" in facts:
            (a, b), (c, d) = spans
            assert (a, d) == (0, total) and b in (39, 40) and c in (46, 47), "black frames belong to neither scene"
            continue
        edges = [0, *facts["cuts"], total]
        assert spans == list(itertools.pairwise(edges)), name


def test_clips_hold_the_frames_they_name(corpus, curated):
    from data_pipelines.decode import stream

    rows = by_source(meta(curated[0], "02_scene_cut"))["cuts_a.mp4"]
    source = [image for _, image in stream(os.path.join(corpus[0], "cuts_a.mp4"))]
    for row in rows:
        clip = [image for _, image in stream(row["path"])]
        assert len(clip) == row["num_frames"] == row["end_frame"] - row["start_frame"]
        for ours, theirs in ((clip[0], source[row["start_frame"]]), (clip[-1], source[row["end_frame"] - 1])):
            assert np.abs(ours.astype(int) - theirs).mean() < 6
    assert rows[0]["start_seconds"] == pytest.approx(rows[0]["start_frame"] / 24, abs=1e-3)


def test_defects_are_caught_and_good_clips_stay(corpus, curated):
    kept = by_source(curated[1].to_pylist())
    expected = collections.Counter()
    for name, facts in corpus[1].items():
        if facts["good"]:
            expected[name] = len(facts["cuts"]) + 1
    assert {name: len(rows) for name, rows in kept.items()} == dict(expected)
    report = {entry["step"]: entry for entry in json.loads(Path(curated[0], "report.json").read_bytes())}
    assert report["usable"]["rows_in"] - report["usable"]["rows_out"] == 5
    assert report["dedup"]["duplicates"] == 1
    assert report["legible"]["conditions"][0]["only"] == 1


def test_motion_is_measured_and_named(corpus, curated):
    kept = by_source(curated[1].to_pylist())
    for name, facts in corpus[1].items():
        if facts.get("cmotion") and facts["good"]:
            assert kept[name][0]["cmotion"] == facts["cmotion"], name
    pan = kept["pan_right.mp4"][0]
    grid = 576 / 160  # a pan of 2 pixels a frame, on the grid of the originals
    assert pan["flow_x"] == pytest.approx(-2 * grid, rel=0.03) and abs(pan["flow_y"]) < 0.1
    assert pan["flow_v12"] == pytest.approx(2 * grid * 10 / 2, rel=0.08), "mean component over 10 frames"
    assert pan["flow_v13"] == pytest.approx(2 * grid * 15, rel=0.08), "mean norm over 15 frames"
    assert pan["camera_x"] == pytest.approx(2 * 24 / 120, rel=0.03)
    zoom = kept["zoom_in.mp4"][0]
    assert zoom["camera_zoom"] == pytest.approx(24 * np.log(1.012), rel=0.1)


def test_shards_hold_the_clips(curated):
    from array_record.python.array_record_module import ArrayRecordReader

    from opensora_jax.data.records import decode_record, read_manifest, verify_folder

    output, table = curated
    folder = os.path.join(output, "pack")
    manifest = read_manifest(folder)
    assert manifest["records"] == table.num_rows and len(manifest["shards"]) == -(-table.num_rows // 7)
    assert verify_folder(folder) == []
    rows = {row["id"]: row for row in table.to_pylist()}
    seen = set()
    for shard in manifest["shards"]:
        reader = ArrayRecordReader(os.path.join(folder, shard["file"]))
        for number, data in enumerate(reader.read_all()):
            record = decode_record(data)
            row = rows[record["id"]]
            assert (row["shard"], row["record"]) == (shard["file"], number)
            assert record["video"] == Path(row["path"]).read_bytes()
            assert record["meta"]["cmotion"] == row["cmotion"] and record["num_frames"] == row["num_frames"]
            seen.add(record["id"])
    assert seen == rows.keys()


def test_a_second_run_does_nothing_and_a_changed_setting_is_refused(corpus, curated, monkeypatch):
    output, table = curated
    monkeypatch.setattr("data_pipelines.parts.perform", lambda *a: pytest.fail("finished work was repeated"))
    again = pipeline.run(curation(), tables.read_input(corpus[0]), Options(output=output, quiet=True))
    assert again.equals(table)
    with pytest.raises(UserError, match=r"another setting of probe\.decode"):
        pipeline.run([step("probe", decode="all")], tables.read_input(corpus[0]), Options(output=output, quiet=True))


def test_long_scenes_are_split_resampled_and_shrunk(corpus, tmp_path):
    cut = step("scene_cut", max_seconds=1.0, min_seconds=0.5, target_fps=12.0, shorter=64, preset="ultrafast")
    table = tables.read_input(os.path.join(corpus[0]))
    table = table.filter(pa.array([name == "cuts_b.mp4" for name in table["source"].to_pylist()]))
    made = pipeline.run([step("probe"), cut], table, Options(output=str(tmp_path), quiet=True)).to_pylist()
    assert [(r["start_frame"], r["end_frame"]) for r in made] == [(0, 12), (12, 25), (25, 41), (41, 58), (58, 75)]
    for row in made:
        with av.open(row["path"]) as clip:
            assert clip.streams.video[0].frames == row["num_frames"] and clip.streams.video[0].average_rate == 12
            assert (row["height"], row["width"]) == (64, 84)


def test_resize_and_frames_alone(corpus, tmp_path, monkeypatch, capsys):
    from data_pipelines import entry
    from data_pipelines.stage import find

    source = os.path.join(corpus[0], "rows.csv")
    with open(source, "w") as handle:
        handle.write("path,text\nvariable.mp4,a slow pan\nrotated.mp4,\n")
    try:
        flags = [f"--input={source}", f"--output={tmp_path / 'r'}", "--height=64", "--width=80", "--quiet"]
        assert entry.stage(find("resize"), flags) == 0
        rows = pq.read_table(tmp_path / "r" / "table.parquet").to_pylist()
        assert {(r["height"], r["width"]) for r in rows} == {(64, 80)}
        slow = next(r for r in rows if r["source"] == "variable.mp4")
        assert slow["text"] == "a slow pan" and abs(slow["seconds"] - 46 / 24) < 0.1
        flags = [f"--input={tmp_path / 'r' / 'table.csv'}", f"--output={tmp_path / 'f'}", "--places=0.1,0.9", "--quiet"]
        assert entry.stage(find("frames"), flags) == 0
        stills = pq.read_table(tmp_path / "f" / "table.parquet").to_pylist()
        assert len(stills) == 4 and all(os.path.isfile(r["path"]) and r["num_frames"] == 1 for r in stills)
        assert entry.stage(find("flow"), [f"--input={source}", f"--output={tmp_path / 'x'}", "--definition=v9"]) == 2
        assert "v12 or v13" in capsys.readouterr().err
    finally:
        os.unlink(source)
