"""Operations on whole data sets, analysis, and the original tools' CSV."""

import functools
import json
import operator
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import analyze, table, tables
from data_pipelines.expression import Expression
from data_pipelines.stage import configure, find, split_commas
from data_pipelines.table import uniform
from opensora_jax.common.errors import guarded
from opensora_jax.data.buckets import BucketTable


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    count = 1000
    made = pa.table(
        {
            "id": [f"clip{k:05d}" for k in range(count)],
            "path": [f"/old/v/{k % 990}.mp4" for k in range(count)],
            "text": [f'says "{k}", twice' if k % 3 else None for k in range(count)],
            "num_frames": rng.integers(1, 200, count),
            "height": [240, 720] * (count // 2),
            "width": [426, 1280] * (count // 2),
            "aes": np.where(rng.random(count) < 0.1, np.nan, rng.normal(5, 1, count)),
            "flow": rng.exponential(5, count),
        }
    )
    made = tables.set_column(made, "aes", pa.array(made["aes"].to_numpy(), from_pandas=True))
    pq.write_table(made, tmp_path / "rows.parquet")
    return made


def run(monkeypatch, tmp_path, *words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["table", *words])
    return guarded(table.main)


def test_csv_of_the_originals_there_and_back(rows, tmp_path, monkeypatch):
    assert run(monkeypatch, tmp_path, "convert", "--input=rows.parquet", "--output=o.csv", "--original") == 0
    back = tables.read(str(tmp_path / "o.csv"))
    assert back.column_names == ["path", "text", "num_frames", "width", "height", "aes", "flow"]
    assert back["text"].to_pylist() == rows["text"].to_pylist()
    assert np.allclose(back["aes"].fill_null(0), rows["aes"].fill_null(0))
    assert run(monkeypatch, tmp_path, "convert", "--input=o.csv", "--output=b.parquet", "--columns=path,aes") == 0
    assert pq.read_table(tmp_path / "b.parquet").column_names == ["path", "aes"]


def test_filter_and_split_in_pieces(rows, tmp_path, monkeypatch, capsys):
    assert (
        run(
            monkeypatch,
            tmp_path,
            "filter",
            "--input=rows.parquet",
            "--output=f.parquet",
            "--keep=aes >= 5, num_frames > 20",
        )
        == 0
    )
    kept = pq.read_table(tmp_path / "f.parquet")
    expected = [r for r in rows.to_pylist() if (r["aes"] or 0) >= 5 and r["num_frames"] > 20]
    assert kept.to_pylist() == expected and f"{len(expected)} of 1000 rows kept" in capsys.readouterr().out
    split = ["split", "--output=s.parquet", "--parts=train:0.8,val:0.15,test:0.05"]
    assert run(monkeypatch, tmp_path, *split, "--input=rows.parquet") == 0
    sides = {n: pq.read_table(tmp_path / f"s_{n}.parquet") for n in ("train", "val", "test")}
    assert (
        sorted(functools.reduce(operator.iadd, (s["id"].to_pylist() for s in sides.values()), []))
        == rows["id"].to_pylist()
    )
    assert abs(sides["train"].num_rows - 800) < 50 and abs(sides["test"].num_rows - 50) < 30
    assert run(monkeypatch, tmp_path, *split, "--input=f.parquet") == 0
    assert set(pq.read_table(tmp_path / "s_val.parquet")["id"].to_pylist()) <= set(sides["val"]["id"].to_pylist())


def test_hash_is_uniform_and_sees_every_letter():
    values = uniform(pa.chunked_array([[f"{k}" for k in range(20000)]]), 0)
    counts = np.histogram(values, 20, (0, 1))[0]
    assert (counts > 880).all() and (counts < 1120).all()
    ids = pa.chunked_array([["", "abc", "abd"], ["bbc", "abc"]])
    value = uniform(ids, 0)
    assert value[1] == value[4] and len(set(value.tolist())) == 4 and uniform(ids, 1)[1] != value[1]
    assert uniform(ids.slice(1, 3), 0).tolist() == value[1:4].tolist()


@pytest.mark.parametrize(
    "words, check",
    [
        (["dedup"], lambda t, rows: t["path"].to_pylist() == rows["path"].to_pylist()[:990]),
        (["sort", "--by=flow", "--descending"], lambda t, _: (np.diff(t["flow"].to_numpy()) <= 0).all()),
        (["head", "--rows=7"], lambda t, rows: t.equals(rows.slice(0, 7))),
        (["shuffle"], lambda t, rows: t["id"] != rows["id"] and t.sort_by("id").equals(rows)),
        (["sample", "--rows=50"], lambda t, rows: t.num_rows == 50 and len(set(t["id"].to_pylist())) == 50),
        (["root", "--root=/new", "--old=/old"], lambda t, _: t["path"][3].as_py() == "/new/v/3.mp4"),
        (["root", "--root=/old", "--relative"], lambda t, _: t["path"][3].as_py() == "v/3.mp4"),
        (["dedup", "--on=text"], lambda t, rows: t.equals(rows)),  # a third has no text, and stays
    ],
)
def test_verbs_on_one_table(rows, tmp_path, monkeypatch, words, check):
    assert run(monkeypatch, tmp_path, *words, "--input=rows.parquet", "--output=o.parquet") == 0
    assert check(pq.read_table(tmp_path / "o.parquet"), rows)


def test_verbs_on_several_tables(rows, tmp_path, monkeypatch):
    first, second = rows.slice(0, 600), rows.slice(400).drop_columns(["aes"]).append_column("ocr", pa.array(range(600)))
    pq.write_table(first, tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    both = ["--input=a.parquet,b.parquet", "--output=o.parquet"]
    read = lambda: pq.read_table(tmp_path / "o.parquet")
    assert (
        run(monkeypatch, tmp_path, "merge", *both) == 0 and read().num_rows == 1200 and read()["ocr"].null_count == 600
    )
    assert run(monkeypatch, tmp_path, "join", *both) == 0
    assert read().num_rows == 600 and read()["ocr"].to_pylist() == [None] * 400 + list(range(200))
    assert (
        run(monkeypatch, tmp_path, "subtract", *both) == 0 and read()["id"].to_pylist() == rows["id"].to_pylist()[:400]
    )
    assert run(monkeypatch, tmp_path, "intersect", *both) == 0 and read().num_rows == 200
    assert run(monkeypatch, tmp_path, "shard", "--input=a.parquet", "--output=o.parquet", "--parts=7") == 0
    parts = [pq.read_table(tmp_path / f"o_{k:03d}.parquet") for k in range(7)]
    assert pa.concat_tables(parts).equals(first)
    assert run(monkeypatch, tmp_path, "bucket", "--input=a.parquet", "--output=o.parquet", "--rows=1") == 0
    shapes = read().select(["height", "width", "num_frames"]).to_pylist()
    assert len({tuple(s.values()) for s in shapes}) == len(shapes) > 150


def test_a_few_rows_of_every_training_bucket(rows, tmp_path, monkeypatch, capsys):
    buckets = {"240p": {1: (1.0, 8), 51: (1.0, 2)}, "144p": {17: (1.0, 4)}}
    (tmp_path / "train.py").write_text(f"def get_config():\n    return {{'data': {{'buckets': {buckets}}}}}\n")
    bucket = ["bucket", "--input=rows.parquet", "--output=o.parquet", "--rows=5"]
    assert run(monkeypatch, tmp_path, *bucket, "--config=train.py") == 0
    find = lambda table: Counter(
        str(BucketTable(buckets, "1.2").assign(row["num_frames"], row["height"], row["width"]))
        for row in table.to_pylist()
    )
    everything = find(rows)
    assert f"3 buckets, {everything.pop('None')} rows without one" in capsys.readouterr().out
    assert find(pq.read_table(tmp_path / "o.parquet")) == {key: min(5, count) for key, count in everything.items()}
    (tmp_path / "train.py").write_text("def get_config():\n    return {'data': {}}\n")
    assert run(monkeypatch, tmp_path, *bucket, "--config=train.py") == 2
    assert "train.py has no data.buckets" in capsys.readouterr().err


def test_values_from_values(rows, tmp_path, monkeypatch):
    value = "id = stem(path), resolution = height * width, few = num_frames < 32 * ceil(if_null(aes, 16) / 16)"
    value += ", text = replace(text, 'twice', 'once') + ' on a still image'"
    assert run(monkeypatch, tmp_path, "set", "--input=rows.parquet", "--output=o.parquet", f"--value={value}") == 0
    made = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["id"] for row in made[:2]] == ["0", "1"] and made[0]["resolution"] == 240 * 426
    assert [row["few"] for row in made] == [row["num_frames"] < 32 for row in rows.to_pylist()]
    assert made[1]["text"] == 'says "1", once on a still image' and made[0]["text"] is None


@pytest.mark.parametrize(
    "path, stem", [("/a.b/c.d.mp4", "c.d"), ("c", "c"), ("s3://x/y.mp4", "y"), (".hidden", ".hidden"), ("", "")]
)
def test_stem(path, stem):
    assert Expression("stem(path)").values(pa.table({"path": [path]})).to_pylist() == [stem]


def test_new_captions_replace_old_ones(tmp_path, monkeypatch):
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "text": ["A", None, "C"], "aes": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    (tmp_path / "b.csv").write_text("id,text,aes,new\nc,c!,,1\nx,x!,9,1\nb,b!,7,1\n")
    assert run(monkeypatch, tmp_path, "update", "--input=a.parquet,b.csv", "--output=o.parquet") == 0
    made = pq.read_table(tmp_path / "o.parquet")
    assert made.to_pydict() == {"id": ["a", "b", "c"], "text": ["A", "b!", "c!"], "aes": [1, 7, 3]}


def test_captions_that_lie_beside_the_videos(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_text("path,text\nv/a.mp4,\nv/b.mp4,old\nv/c.mp4,old\n")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.txt").write_text("from a text file\n")
    (tmp_path / "v" / "b.json").write_text('{"caption": "from JSON"}')
    assert run(monkeypatch, tmp_path, "captions", "--input=a.csv", "--output=o.parquet") == 0
    assert pq.read_table(tmp_path / "o.parquet")["text"].to_pylist() == ["from a text file", "from JSON", "old"]
    assert "2 of 3 rows" in capsys.readouterr().out
    (tmp_path / "v" / "c.json").write_text("{")
    assert run(monkeypatch, tmp_path, "captions", "--input=a.csv", "--output=o.parquet") == 2
    assert "c.json is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["filter", "--input=rows.parquet", "--output=o.parquet", "--keep=aez > 1"], "did you mean aes"),
        (["filter", "--input=rows.parquet", "--output=o.txt", "--keep=aes > 1"], "tables are .parquet or .csv"),
        (["join", "--input=rows.parquet", "--output=o.parquet"], "join needs 2 inputs"),
        (["sort", "--input=rows.parquet", "--output=o.parquet", "--by=nope"], "has no column nope"),
        (["split", "--input=rows.parquet", "--output=o.parquet", "--parts=a:0.5,b:0.4"], "add up to 0.9"),
        (["info", "--input=none.parquet"], "does not exist"),
        (["sort", "--input=rows.parquet,rows.parquet", "--output=o.parquet"], "with merge first"),
        (["set", "--input=rows.parquet", "--output=o.parquet", "--value=aes"], "set needs --value"),
        (["set", "--input=rows.parquet", "--output=o.parquet", "--value=a = text * 2"], "does not fit the columns"),
        (["filter", "--input=rows.parquet", "--output=o.parquet", "--keep=contains(text, path)"], "does not fit"),
        (["update", "--input=rows.parquet,texts.csv", "--output=o.parquet"], "these tables do not fit"),
    ],
)
def test_mistakes_are_one_sentence(rows, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "texts.csv").write_text("id,num_frames\nclip00001,many\n")
    assert run(monkeypatch, tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_analysis_counts_right(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze", f"--input={tmp_path / 'rows.parquet'}", f"--output={tmp_path / 'r'}"])
    assert guarded(analyze.main) == 0
    facts = json.loads((tmp_path / "r" / "report.json").read_text())
    aes = rows["aes"].drop_null().to_numpy()
    assert facts["aes"]["missing"] == rows["aes"].null_count and facts["aes"]["mean"] == pytest.approx(aes.mean())
    for q in (5, 50, 95):
        assert facts["aes"][f"p{q}"] == pytest.approx(np.percentile(aes, q), abs=0.03)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "1,000 rows" in page and all((tmp_path / "r" / f"{name}.png").stat().st_size > 1000 for name in facts)
    said = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert said["column"][1:4] == ["missing", "min", "p5"] and len(said) == len(facts) + 1
    assert said["aes"][1:3] == [str(rows["aes"].null_count), analyze.shown(aes.min())]


def test_percentiles_hold_however_far_the_range_reaches(tmp_path):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.lognormal(14, 1, 10_000), [4e9, np.inf, np.nan]])
    offsets = rng.normal(-3, 5, len(sizes))
    table = pa.table({"filesize": sizes, "offset": offsets, "frames": np.arange(len(sizes)) % 500})
    pieces = lambda columns: [table.select(columns).slice(0, 4000), table.select(columns).slice(4000)]
    summaries = analyze.summarise(pieces, table.column_names)
    facts = analyze.report(summaries, str(tmp_path), "x")
    for name, values in (("filesize", sizes[:-2]), ("offset", offsets)):
        for q in (1, 5, 25, 50, 75, 95, 99):
            exact = np.sort(values)[int(np.ceil(q / 100 * len(values))) - 1]
            assert facts[name][f"p{q}"] == pytest.approx(exact, rel=1 / 512)
    assert facts["filesize"]["missing"] == 2 and facts["filesize"]["max"] == 4e9
    assert facts["frames"]["p50"] == 249 and facts["frames"]["p99"] == 494
    counts, edges, outside = summaries[0].bars()
    assert counts.sum() + outside == 10_001 and edges[-1] < 1e8 and 0 < outside < 200  # 4 GB are no reason for one bar
    assert summaries[2].bars()[2] == 0


@pytest.mark.parametrize(
    "value, text",
    [
        (19200.0, "19,200"),
        (0.78243, "0.782"),
        (24.0, "24"),
        (0.0, "0"),
        (-3.14159, "-3.14"),
        (2e-7, "2.0e-07"),
        (7, "7"),
    ],
)
def test_numbers_are_shown_with_as_many_digits_as_one_reads(value, text):
    assert analyze.shown(value) == text


def test_a_column_of_one_value_and_one_of_words(tmp_path):
    table = pa.table({"fps": [24.0] * 5, "cmotion": ["static", "pan left", "static", "static", None]})
    facts = analyze.report(
        analyze.summarise(lambda columns: [table.select(columns)], ["fps", "cmotion"]), str(tmp_path), "x"
    )
    assert facts["fps"]["min"] == facts["fps"]["p50"] == facts["fps"]["max"] == 24
    head, fps, words = analyze.overview(facts)
    assert fps[head.index("p95")] == "24" and words[-1] == "static 3, pan left 1" and words[1] == "1"


def test_conditions_are_parted_outside_brackets_and_quotes():
    assert list(split_commas("a in (1, 2),contains(t, 'x,y'), b > 1")) == [
        "a in (1, 2)",
        "contains(t, 'x,y')",
        " b > 1",
    ]
    keep = configure(find("filter"), {"keep": "cmotion in ('static', 'pan left'),aes > 5"}).keep
    assert keep == ("cmotion in ('static', 'pan left')", "aes > 5")
