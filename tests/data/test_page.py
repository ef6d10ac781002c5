"""docs/data.md: what runs in seconds runs; the flags of what takes minutes are those that the commands have."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from opensora_jax import config
from opensora_jax.common.errors import UserError
from opensora_jax.training.run import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()


def commands(fence):
    blocks = re.findall(rf"```{fence}\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().split("\n")]


def test_quick_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands("bash"):
        assert words[:2] == ["python", "-m"]
        monkeypatch.setattr("sys.argv", words[2:])
        assert not importlib.import_module(words[2]).main()
    said = capsys.readouterr().out
    assert "32 clips in 1 shards" in said and "8 steps an epoch" in said
    assert (tmp_path / "REPORT" / "samples.png").exists()


def check(words):
    module = importlib.import_module(words[2])
    if words[2].startswith(("opensora_jax.train", "opensora_jax.encode", "opensora_jax.data.inspect")):
        args, overrides = module.arguments(words[3:])
        tree = config.load(args.config, overrides) if args.config else {}
        config.build(RunConfig, tree, "config")
    else:
        flags = [word.split("=")[0] for word in words[3:] if not word.startswith("--config.")]
        source = Path(module.__file__).read_text() + (ROOT / "data_pipelines" / "entry.py").read_text()
        assert all(f'"{flag}"' in source for flag in flags)


@pytest.mark.parametrize("words", commands("sh"), ids=lambda words: words[2])
def test_long_commands_have_these_flags(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(words)


def test_a_wrong_flag_would_be_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="did you mean"):
        check(["python", "-m", "opensora_jax.train", "--config=configs/debug.py", "--config.data.sourse=x"])
