"""docs/data.md, from top to bottom: a folder of videos becomes a training run."""

import importlib
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().split("\n")]


def run(words, monkeypatch):
    """The command in this process: starting Python and JAX anew for each would take most of the test's time."""
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    monkeypatch.setattr("sys.argv", words[2:])
    try:
        return (module.main() if hasattr(module, "main") else module.run()) or 0
    except SystemExit as end:
        return end.code or 0


def test_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("data_pipelines", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = {}
    for words in commands():
        assert run(words, monkeypatch) == 0, words
        said[words[2]] = capsys.readouterr().out
    assert "32 clips (latents), 0 unreadable" in said["opensora_jax.data.inspect"]
    assert (tmp_path / "REPORT" / "samples.png").exists() and (tmp_path / "RUN" / "metrics.jsonl").exists()
