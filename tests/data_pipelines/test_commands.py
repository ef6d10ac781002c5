"""Flags of the commands that take weights or a cluster, the configs, and what a user's mistake looks like."""

import dataclasses
import re
import shlex
import sys
import typing
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipelines import entry, run, tables
from data_pipelines.stage import configure, find, names
from opensora_jax.common.errors import UserError, guarded

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "curation.md").read_text()


def commands(fence):
    blocks = re.findall(rf"```{fence}\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().split("\n")]


def test_commands_that_need_weights_or_servers_have_real_flags(monkeypatch):
    found = commands("sh")
    assert len(found) > 3
    for words in found:
        stage = words[2].split(".")[-1]
        given = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
        shared = {action.dest for action in entry.parser("", "")._actions} | {"config"}
        options = {name: value for name, value in given.items() if name not in shared}
        if stage != "run":
            configure(find(stage), options)


@pytest.mark.parametrize("path", sorted((ROOT / "data_pipelines" / "configs").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_configs_load_and_take_overrides(path):
    steps = run.steps(run.load(str(path), ["--config.scene_cut.max_seconds=3", "--config.good.keep=('flow > 2',)"]))
    found = {step.label: step.config for step in steps}
    assert found["scene_cut"].max_seconds == 3.0 and found["good"].keep == ("flow > 2",)


def test_every_stage_says_what_it_reads_and_writes():
    for name in names():
        stage = find(name)
        assert stage.__doc__ or sys.modules[stage.__module__].__doc__
        assert len(stage.schema().names) == len(set(stage.schema().names))
    assert {"probe", "scene_cut", "flow", "ocr", "dedup", "caption", "filter", "pack"} <= set(names())


def test_help_explains_the_options(capsys):
    with pytest.raises(SystemExit):
        entry.stage(find("caption"), ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--side N longer side of the frames that are sent (default 512)" in said
    assert "--model TEXT its name on the server (required)" in said and "--input PATH a folder of videos" in said


@pytest.mark.parametrize("name", names())
def test_every_option_is_explained(name):
    config = find(name).Config
    assert {field.name for field in dataclasses.fields(config)} <= set(entry.remarks(config))
    assert {typing.get_type_hints(config)[field.name] for field in dataclasses.fields(config)} <= set(entry.METAVARS)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=none.py"], "none.py does not exist"),
        (["--config=CURATE", "--config.scene_cut.max_second=3"], "no option max_second; did you mean max_seconds?"),
        (["--config=CURATE", "--config.scene_cutt.x=3"], "there is no step scene_cutt"),
        (["--config=CURATE", "--confg.x=3"], "unknown flag --confg.x=3"),
        (["--config=CURATE", "--config.usable.keep=('aes > 1',)"], "usable needs the column aes"),
        (["--config=CURATE", "--config.ocr.frames=many"], "ocr.frames must be int, not 'many'"),
        (["--config=CURATE", "--config.flow.stage=flaw"], "no stage called flaw; did you mean flow?"),
    ],
)
def test_mistakes_are_one_sentence(words, message, corpus, tmp_path, monkeypatch, capsys):
    words = [word.replace("CURATE", str(ROOT / "data_pipelines" / "configs" / "curate.py")) for word in words]
    monkeypatch.setattr(sys, "argv", ["run", f"--input={corpus[0]}", f"--output={tmp_path / 'o'}", *words])
    assert guarded(run.main) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert message in error


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.load("data_pipelines/configs/curate.py", []).steps[0] == "probe"


def test_results_inside_the_videos_are_refused(corpus, monkeypatch, capsys):
    folder = corpus[0]
    for output in (f"{folder}/WORK", str(folder)):
        assert entry.stage(find("probe"), [f"--input={folder}", f"--output={output}"]) == 2
        assert "the next run would take clips for videos" in capsys.readouterr().err


def test_a_folder_of_results_is_its_table(tmp_path):
    made = pa.table({"id": ["a"], "path": ["a.mp4"]})
    for name in ("meta/00_probe/part-1.parquet", "rejected/00_probe.parquet", "table.parquet"):
        tables.write_parquet(made, str(tmp_path / name))
    assert tables.read_input(str(tmp_path)).num_rows == 1
    assert sum(piece.num_rows for piece in tables.Pieces(str(tmp_path))()) == 1


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no video and no Parquet file"):
        tables.read_input(str(tmp_path))
