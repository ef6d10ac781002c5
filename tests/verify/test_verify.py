"""What verify says of good, wrong and malformed recordings, and its exit codes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax.verify.__main__ import main
from opensora_jax.verify.compare import compare

CASE = "osp_eval_clipscore"  # arrays through a metric: nothing to compile
FIELDS = {"case", "family", "run", "output", "max_abs", "rel_l2", "tolerance", "ok"}


@pytest.fixture
def case(goldens, tmp_path):
    return shutil.copytree(goldens / CASE, tmp_path / "cases" / CASE)


def told(case, change):
    path = case / "case.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    return case.parent


def with_output(case, name, change):
    outputs = load_file(case / "outputs.safetensors")
    save_file(outputs | {name: np.asarray(change(outputs[name]))}, case / "outputs.safetensors")
    return case.parent


def test_a_good_case(case, capsys):
    assert main([str(case)]) == main([str(case.parent)]) == 0
    assert "1 of 1 cases ok" in capsys.readouterr().out


def test_json_rows(case, capsys):
    assert main([str(case), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(row.keys() >= FIELDS and row["case"] == CASE and row["ok"] for row in rows)


@pytest.mark.parametrize("value", [1.01, np.nan, -np.inf], ids=str)
def test_a_wrong_output_fails(case, capsys, value):
    assert main([str(with_output(case, "r0/clip_score", lambda a: a * np.float32(value)))]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main([str(case), "--json"]) == 1
    strict = lambda text: pytest.fail(f"{text} is not JSON")
    rows = [json.loads(line, parse_constant=strict) for line in capsys.readouterr().out.splitlines()]
    assert [row["output"] for row in rows if not row["ok"]] == ["clip_score"]


def test_another_shape_fails(case):
    assert main([str(with_output(case, "r0/clip_score", lambda a: np.resize(a, 3)))]) == 1


def test_an_output_that_we_do_not_give_fails(case, capsys):
    outputs = load_file(case / "outputs.safetensors")
    save_file(outputs | {"more": np.ones(2, np.float32)}, case / "outputs.safetensors")
    assert main([str(told(case, lambda d: d["outputs"].update(more={})))]) == 1
    assert "our code gave no such output" in capsys.readouterr().out


MALFORMED = {
    "no adapter replays 'klatte'": lambda case: told(case, lambda d: d.update(family="klatte")),
    "lacks runs": lambda case: told(case, lambda d: d.pop("runs")),
    "lacks config": lambda case: told(case, lambda d: d.update(config=[])),
    "every run and every output is a table": lambda case: told(case, lambda d: d.update(runs={"r0": 1})),
    "is not a readable case": lambda case: (case / "case.json").write_text('{"case": '),
    "is not a table of tables": lambda case: (case / "case.json").write_text("[1]"),
    "do not name the same outputs": lambda case: told(case, lambda d: d["outputs"].pop("r0/clip_score")),
    "weights.safetensors is missing": lambda case: told(case, lambda d: d.update(weights=True, family="t5_encoder")),
    "not a readable safetensors file": lambda case: (case / "inputs.safetensors").write_bytes(b"cut"),
    "cannot be replayed": lambda case: (case / "inputs.safetensors").unlink(),
    "nothing to compare": lambda case: [
        told(case, lambda d: d.update(outputs={})),
        (case / "outputs.safetensors").unlink(),
    ],
}


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_case_is_one_line_and_the_others_are_replayed(case, goldens, message, capsys):
    shutil.copytree(goldens / CASE, case.parent / "whole")
    MALFORMED[message](case)
    assert main([str(case.parent)]) == 2
    said = capsys.readouterr()
    assert "1 of 2 cases ok" in said.out
    line, rest = said.err.strip().rpartition("\n")[::-2]
    assert message in line and line.startswith("error: ") and not rest


def test_what_is_no_case_at_all(tmp_path):
    words = [sys.executable, "-m", "opensora_jax.verify", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "holds no case.json" in done.stderr and done.stdout == ""


def test_only_one_family(case, goldens, capsys):
    shutil.copytree(goldens / "v13_mask_strategy", case.parent / "other")
    assert main([str(case.parent), "--family=evaluate"]) == main([str(case.parent), "--family=osp_eval"]) == 0
    assert capsys.readouterr().out.count("1 of 1 cases ok") == 2


TOLERANCE = {"max_abs": 1e-3, "rel_l2": 1e-3}


@pytest.mark.parametrize(
    ("ours", "recorded", "ok"),
    [
        ([1.0, 2.0], [1.0005, 2.0], True),
        ([1.0, 2.0], [1.002, 2.0], False),  # within rel_l2 alone
        ([1e-2, 0.0], [1.05e-2, 0.0], False),  # within max_abs alone
        ([9e-7, 0.0], [0.0, 0.0], True),  # nearly zero
        (5e-4, 4e-4, True),  # a small number, within max_abs alone
        (1.002e-2, 1e-2, False),  # a number that is not small
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.nan, 1.0], [np.inf, 1.0], False),
    ],
)
def test_both_bounds_hold(ours, recorded, ok):
    labels = dict.fromkeys(("case", "family", "run", "output"), "")
    assert compare(labels, np.float32(ours), np.float32(recorded), TOLERANCE).ok == ok


def test_integers_are_exact():
    labels = dict.fromkeys(("case", "family", "run", "output"), "")
    assert compare(labels, np.array([3]), np.array([3]), None).ok
    assert not compare(labels, np.array([2**53]), np.array([2**53 + 1]), None).ok
