"""The command: mistakes are one line and exit 2; with libtpu, a tiny training step compiled for a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_jax.common.errors import UserError, guarded
from opensora_jax.plan import libtpu
from opensora_jax.plan.__main__ import main, set_mesh

REPO = Path(__file__).parents[2]
TINY = (
    "--config=configs/debug.py", "--topology=v5e:2x2", "--config.vae.filters=4", "--config.model.depth=1",
    "--config.data.batch_size=1", "--mesh=data=2,fsdp=2,rules=fsdp",
)  # fmt: skip


@pytest.mark.parametrize(
    "words, said",
    [
        (["--topology=v5p:4x4x4"], "--config=FILE is missing"),
        (["--config=configs/stage3.py"], "--topology is missing; for example v5p:4x4x4"),
        (["--config=configs/stage3.py", "--topology=v9:4x4"], "no chip is called v9"),
        (["--config=configs/stage3.py", "--topology=v5p:4x4x4", "--mesh=dat=2"], "is not AXIS=N"),
        (["--config=configs/stage3.py", "--topology=v5p:4x4x4", "--serch"], "did you mean --search"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert guarded(lambda: main(words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_libtpu_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
    assert guarded(lambda: main(["--config=configs/stage3.py", "--topology=v5p:4x4x4"])) == 2
    assert "opensora-jax[aot]" in capsys.readouterr().err


def test_mesh_replaces_the_configs():
    tree = {"mesh": {"data": 3, "fsdp": 8, "rules": "fsdp"}}
    set_mesh(tree, "fsdp=4, context=8, rules=full")
    assert tree["mesh"] == {"data": -1, "fsdp": 4, "context": 8, "rules": "full"}
    with pytest.raises(UserError, match="axes are data, fsdp, context, tensor"):
        set_mesh(tree, "slice=2")


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot)")
def test_a_tiny_step_compiles_for_a_tpu(tmp_path):
    command = [sys.executable, "-m", "opensora_jax.plan", *TINY, "--json"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["source"] == "compiler" and found["fits"] and found["chips"] == 4
    assert found["seconds"]["fusions"] > 0 and found["memory"]["arguments"] > 0
    assert {"all-gather", "all-reduce"} & {c["kind"] for c in found["collectives"]}
    assert list(tmp_path.iterdir()) == []  # the compiler's logs went with the process
