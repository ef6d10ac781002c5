"""docs/convert.md, followed by a new user: its script records a case, and verify replays it."""

import json
import re
from pathlib import Path

import pytest

from opensora_jax.verify.__main__ import main

pytestmark = pytest.mark.parity
PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def test_the_script_of_the_page_records_a_case(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = re.search(r"```python\n(# record\.py\n.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(compile(script, "record.py", "exec"), {})
    assert main(["cases"]) == 0
    assert "1 of 1 cases ok" in capsys.readouterr().out
    case = Path("cases/my_t5/case.json")
    description = json.loads(case.read_text())
    description["outputs"]["long/last_hidden_state"]["tolerance"] = {"max_abs": 0.0, "rel_l2": 0.0}
    case.write_text(json.dumps(description))
    assert main(["cases", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["run"], row["ok"]) for row in rows} == {("short", True), ("long", False)}
