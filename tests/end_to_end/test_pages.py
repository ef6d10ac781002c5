"""README.md and the pages that a newcomer reads first: commands in ```bash blocks run, in an empty folder and in order;
of all others (```sh and indented blocks, inline code: hardware, downloads, hours) the names, flags and keys are checked.

Runs are shortened by overrides appended to the page's own command, and a command that several pages give is run once.
"""

import importlib
import re
import shlex
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from opensora_jax import config
from opensora_jax.common.errors import UserError
from opensora_jax.training.run import RunConfig

REPO = Path(__file__).parents[2]
PAGES = {
    name: (REPO / name).read_text()
    for name in ("README.md", *(f"docs/{n}.md" for n in ("quickstart", "train", "sample")))
}
SHORT = {
    "opensora_jax.train": (
        "--config.steps=2",
        "--config.data.batch_size=1",  # a device: the suite has eight
        "--config.log.sample_every_steps=0",
    ),
}
TARGETS = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)


def blocks(page: str, fence: str) -> list[str]:
    return re.findall(rf"```{fence}\n(.*?)```", page, re.DOTALL)


def runnable() -> list[list[str]]:
    """The commands of all ```bash blocks, each once, in the order of the pages."""
    found = {}
    for page in PAGES.values():
        for line in "".join(blocks(page, "bash")).splitlines():
            if words := shlex.split(line, comments=True):
                found.setdefault(tuple(words))
    return list(map(list, found))


def mentioned():
    """(page, words) of every other command: `make`, `pip` and `python -m` in blocks and inline code."""
    for name, page in PAGES.items():
        page = re.sub(r"```(bash|python)\n.*?```", "", page, flags=re.DOTALL)
        lines = "".join(blocks(page, "sh")).splitlines() + re.findall(r"^    (.*)$", page, re.MULTILINE)
        lines += re.findall(
            r"`((?:make|pip install|python -m) [^`]*)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)
        )
        for line in lines:
            if re.match(r"(make|pip install|python -m) ", line):
                yield name, shlex.split(line, comments=True)


def check(words: list[str]) -> None:
    """Names, flags and configuration keys are real; brackets, dots and capitals of a template count for nothing."""
    if words[0] == "make":
        assert words[1] in TARGETS, words
        return
    if words[0] == "pip":
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,]+)\]", words[2])
        assert all(extra in extras for extra in ",".join(named).split(",") if extra), words
        return
    module = importlib.import_module(words[2])
    flags = [word.strip("[]") for word in words[3:]]
    flags = [word for word in flags if word.startswith("--") and not word.startswith("--config.key")]
    flags = [word for word in flags if not word.startswith("--config=FILE")]
    paths = [word for word in words[3:] if not word.startswith(("-", "["))]
    if not hasattr(module, "arguments"):
        module = importlib.import_module(f"{words[2]}.__main__")
        module.arguments([*paths, *flags])
        return
    args, overrides = module.arguments(flags)
    if getattr(args, "config", None) and "/sample/" not in args.config:
        config.build(RunConfig, config.load(args.config, overrides), "config")


def test_commands_run_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in runnable():
        if words[0] == "source":
            continue
        assert words[:2] == ["python", "-m"], words
        words = [*words, *SHORT.get(words[2], ())]
        monkeypatch.setattr(sys, "argv", words[2:])
        assert importlib.import_module(words[2]).main() == 0, capsys.readouterr().err
    assert (tmp_path / "runs/debug/metrics.jsonl").exists() and (
        tmp_path / "runs/debug/pipeline/model_index.json"
    ).exists()
    made = {path.suffix for path in (tmp_path / "outputs").iterdir() if path.name.startswith("0000-a-red-circle")}
    assert made == {".gif", ".json", ".mp4"} and (tmp_path / "outputs/sheet.png").exists()
    snippet = re.search(r"^    from opensora_jax.*\n(?:    .*\n?)*", PAGES["docs/sample.md"], re.MULTILINE)
    found = {}
    exec(textwrap.dedent(snippet.group()), found)  # the library call for the same
    assert found["frames"].shape == (1, 17, 32, 32, 3)


@pytest.mark.parametrize(
    ("page", "words"), mentioned(), ids=lambda value: value if isinstance(value, str) else " ".join(value[:3])
)
def test_other_commands_are_real(page, words, monkeypatch):
    monkeypatch.chdir(REPO)
    check(words)


def test_a_wrong_command_would_be_noticed(monkeypatch):
    monkeypatch.chdir(REPO)
    for command in (
        "python -m opensora_jax.train --config=configs/debug.py --workdri=x",
        "python -m opensora_jax.train --config=configs/debug.py --config.stepz=3",
        "python -m opensora_jax.sample --from=x --promt=a",
    ):
        with pytest.raises(UserError, match="did you mean"):
            check(shlex.split(command))
    for command in ("make dmeo", 'pip install ".[cdua]"'):
        with pytest.raises(AssertionError):
            check(shlex.split(command))
