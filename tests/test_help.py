"""What costs a newcomer's patience: `--help` of every entry, and importing the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SECONDS = 2.0


def entries():
    """Every module that can be run with -m."""
    for room in ("opensora_jax", "data_pipelines"):
        for path in sorted((REPO / room).rglob("*.py")):
            if path.name == "__main__.py" or 'if __name__ == "__main__":' in path.read_text():
                yield ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__main__")


def answer(*words: str) -> tuple[str, float]:
    """What Python prints, and the seconds of processor time that it took: the machine may be busy."""
    process = subprocess.Popen([sys.executable, *words], cwd=REPO, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return said, used.ru_utime + used.ru_stime


def test_there_are_entries():
    found = set(entries())
    wanted = {"train", "sample", "encode", "convert", "verify", "evaluate", "data.inspect", "data.shapes"}
    assert {f"opensora_jax.{name}" for name in wanted} | {"data_pipelines.run", "data_pipelines.flow"} <= found


@pytest.mark.parametrize("module", entries())
def test_help_is_quick_and_says_how_to_call_it(module):
    said, seconds = answer("-m", module, "--help")
    usage, _, rest = said.partition("\n\n")
    assert usage.startswith(f"usage: python -m {module} ")
    summary, _, flags = rest.partition("\noptions:\n")
    assert len(summary.strip()) > 40 and "--help" in flags
    assert seconds < SECONDS


def test_importing_the_package_imports_no_jax():
    said, seconds = answer("-c", "import sys, opensora_jax; print(*sys.modules)")
    assert not {"jax", "numpy", "flax"} & set(said.split()) and seconds < 1
