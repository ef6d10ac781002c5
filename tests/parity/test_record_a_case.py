"""docs/convert.md, followed by a new user: its script records a case, and verify replays it."""

import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax.verify.__main__ import main

pytestmark = pytest.mark.parity
WRONG = "long/last_hidden_state"
PAGE = Path(__file__).parents[2] / "docs" / "convert.md"


def test_the_script_of_the_page_records_a_case(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = re.search(r"```python\n(# record\.py\n.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(compile(script, "record.py", "exec"), {})
    assert main(["cases"]) == 0
    assert "1 of 1 cases ok" in capsys.readouterr().out
    recorded = load_file("cases/my_t5/outputs.safetensors")
    save_file(recorded | {WRONG: recorded[WRONG] + 1e-3}, "cases/my_t5/outputs.safetensors")
    assert main(["cases", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["run"], row["ok"]) for row in rows} == {("short", True), ("long", False)}
