"""The trainer through its public entry: what survives a kill, what is refused, what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from opensora_jax import config, train
from opensora_jax.common.errors import UserError
from opensora_jax.trainer import Trainer
from opensora_jax.training.metrics import read_jsonl

REPO = Path(__file__).parents[2]


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_jsonl(workdir / "metrics.jsonl")}


def state_of(workdir, step):
    """All arrays of a checkpoint by name, read without the trainer."""
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "ema", "opt"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {item + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found


def same_state(a, b, step):
    ours, theirs = state_of(a, step), state_of(b, step)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, latents):
    from tests.end_to_end.conftest import COMMON

    workdir = tmp_path_factory.mktemp("unbroken")
    flags = [*COMMON, f"--config.data.source={latents}", f"--workdir={workdir}"]
    assert train.main([*flags, "--config.steps=9", "--config.checkpoint.every_steps=3"]) == 0
    return workdir


def test_a_killed_run_ends_bitwise_like_an_unbroken_one(unbroken, tmp_path, run_flags):
    """kill -9 from outside at whatever step it is in; then the same command again, until it ends."""
    flags = run_flags(tmp_path, steps=9, checkpoint__every_steps=3)
    command = [sys.executable, "-m", "opensora_jax.train", *flags]
    process = subprocess.Popen(command, cwd=REPO, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 9 not in losses(tmp_path)
    assert train.main(flags) == 0
    assert losses(tmp_path) == losses(unbroken)
    same_state(tmp_path, unbroken, 9)


def test_sigterm_saves_and_the_rest_is_the_same(unbroken, tmp_path, run_flags, monkeypatch):
    from opensora_jax.training import hooks

    flags = run_flags(tmp_path, steps=9, checkpoint__every_steps=100)
    step = hooks.Reporter.step

    def stop_at_four(self, number, *args, **kwargs):
        step(self, number, *args, **kwargs)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(hooks.Reporter, "step", stop_at_four)
        assert train.main(flags) == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]
    assert train.main(flags) == 0
    same_state(tmp_path, unbroken, 9)


def test_a_run_compiles_no_more_often_than_it_has_buckets(run_flags, tmp_path, monkeypatch):
    """The data has two shapes. Every compilation of the process is counted, as JAX reports it: the step's are one a
    shape, and a step whose shape was seen before compiles nothing at all."""
    compiled, steps = [], []

    def count(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    compile_step = Trainer.compile_step

    def counted(self, tx, abstract):
        step = compile_step(self, tx, abstract)

        def run(state, batch, frozen):
            before = len(compiled)
            out = step(state, batch, frozen)
            steps.append((batch["latents"].shape, compiled[before:]))
            return out

        return run

    monkeypatch.setattr(Trainer, "compile_step", counted)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        assert train.main(run_flags(tmp_path, steps=8)) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    shapes = [shape for shape, _ in steps]
    assert len(shapes) == 8 and len(set(shapes)) == 2
    assert sum(name == "jit(step)" for name in compiled) == 2
    for i, (shape, names) in enumerate(steps):
        assert names == ([] if shape in shapes[:i] else ["jit(step)"]), f"step {i + 1} of {shape}"


def test_the_run_says_what_it_did(unbroken):
    rows = read_jsonl(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    wanted = {"loss", "grad_norm", "learning_rate", "steps_per_second", "tokens_per_second", "data_wait_share"}
    assert wanted <= set(rows[0]) and all(np.isfinite(row["loss"]) for row in rows)
    saved = json.loads((unbroken / "config.json").read_text())
    assert saved["steps"] == 9 and saved["model"]["family"] == "stdit3"


def test_other_data_is_refused_on_resume(unbroken, run_flags):
    with pytest.raises(UserError, match="order of clips"):
        train.main(run_flags(unbroken, steps=12, data__batch_size=2))


def test_weights_of_another_run_start_a_new_one(unbroken, tmp_path, run_flags):
    flags = run_flags(tmp_path, steps=1, init_from=f"{unbroken}@9", optimizer__learning_rate=0.0)
    assert train.main(flags) == 0
    old, new = state_of(unbroken, 9), state_of(tmp_path, 1)
    for name in old:
        if name.startswith("ema"):
            np.testing.assert_array_equal(new["params" + name.removeprefix("ema")], old[name], err_msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config=FILE is missing"),
        (["--config=configs/debgu.py", "--workdir=x"], "did you mean configs/debug.py"),
        (["--config=configs/debug.py"], "--workdir=DIR is missing"),
        (["--config=configs/debug.py", "--workdir=x", "--config.stepz=3"], "did you mean steps"),
        (["--config=configs/debug.py", "--workdir=x", "--config.steps=many"], "config.steps must be int"),
        (["--config=configs/debug.py", "--workdir=x", "--confg.steps=3"], "is not a flag"),
        (["--config=configs/debug.py", "--workdir=/proc/none"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        train.main(flags)
    assert "\n" not in str(caught.value)


def test_entries_print_one_line_and_exit_with_2():
    command = [sys.executable, "-m", "opensora_jax.train", "--config=configs/none.py"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_every_shipped_config_is_valid():
    from opensora_jax.training.run import RunConfig

    for name in config.shipped():
        if "/sample/" not in name:
            cfg = config.build(RunConfig, config.read_file(name), "config")
            assert config.read_file(name).keys() <= config.to_plain(cfg).keys()
