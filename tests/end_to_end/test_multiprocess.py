"""Runs on several real processes through the public entry, eight fake devices in all: collectives by gloo on loopback.

One story, told once: two processes train until one is killed; their run goes on with one process, and with four."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from opensora_jax import train
from opensora_jax.data.records import ShardWriter, write_manifest
from opensora_jax.training.metrics import read_jsonl
from opensora_jax.weights.store import Folder
from tests.conftest import REPO

CLIPS, BATCH = 32, 8
SLOWEST_SECONDS = 600  # on a busy machine; the whole file takes a minute on a quiet one
FLAGS = (
    "--config=configs/debug.py",
    "--config.vae=None",
    "--config.text_encoder=None",
    "--config.text.tokenizer=",
    "--config.log.sample_every_steps=0",
    "--config.log.tensorboard=False",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2",
    "--config.model.depth=1",
    "--config.model.hidden_size=24",
    "--config.optimizer.eps=1e-6",  # else rounding noise of weights without a gradient becomes whole steps
)
CUT = {"data": 1, "fsdp": 8, "rules": "fsdp"}  # parameters over all devices, so over all processes


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, records_per_shard=16) as writer:
        for i in range(CLIPS):
            writer.write(
                {
                    "id": f"clip-{i}",
                    "text": "a clip",
                    "num_frames": 13,
                    "fps": 8.0,
                    "height": 32,
                    "width": 32,
                    "latents": rng.standard_normal((4, 4, 4, 4), np.float32),
                    "text_emb": rng.standard_normal((16, 32), np.float32),
                    "text_mask": (np.arange(16) < 4 + i % 8).astype(np.int32),
                }
            )
    write_manifest(folder)
    return folder


def flags_of(clips, workdir, steps):
    flags = [*FLAGS, f"--workdir={workdir}", f"--config.data.source={clips}", f"--config.steps={steps}"]
    flags += [f"--config.mesh.{axis}={size}" for axis, size in CUT.items()]
    return [*flags, f"--config.data.batch_size={BATCH // 8}"]


def environment(processes):
    devices = f"--xla_force_host_platform_device_count={8 // processes}"  # of two numbers the last one counts
    return os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"}


@contextlib.contextmanager
def started(flags, processes):
    """The processes of one run, killed at the end if they still live."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = environment(processes) | {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(processes)}
    start = lambda i: subprocess.Popen(
        [sys.executable, "-m", "opensora_jax.train", *flags],
        cwd=REPO,
        env=env | {"PROCESS_ID": str(i)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = [start(i) for i in range(processes)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((SLURM_PROCID = 0; SLURM_PROCID < SLURM_NTASKS; SLURM_PROCID++)); do
  export SLURM_PROCID SLURM_LOCALID=0; "$@" & pids="$pids $!"
done
trap 'kill $pids' TERM
for pid in $pids; do wait $pid || code=$?; done
exit ${code:-0}
"""


def through_slurm(flags, workdir, processes, folder):
    """The same run by launch/slurm.sh, with a stand-in for srun; returns its exit code."""
    for name, text in (("srun", SRUN), ("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = next(job for job in range(os.getpid(), os.getpid() + 4096) if is_free(61440 + job % 4096))
    env = environment(processes) | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NTASKS": str(processes)}
    env |= {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "PYTHONPATH": str(REPO)}
    env |= {"CONFIG": "configs/debug.py", "WORKDIR": str(workdir), "ARGS": " ".join(flags)}
    process = subprocess.Popen(["bash", "launch/slurm.sh"], cwd=REPO, env=env, stdout=subprocess.DEVNULL)
    try:
        return process.wait(timeout=SLOWEST_SECONDS)
    finally:
        process.terminate()


def is_free(port):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_jsonl(workdir / "metrics.jsonl")}


def parameters(workdir, step, item):
    """{path: array} of a checkpoint, read without the trainer."""
    folder, reader = workdir / "checkpoints" / str(step) / item, ocp.PyTreeCheckpointer()
    as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    tree = reader.restore(folder, restore_args=jax.tree.map(as_numpy, reader.metadata(folder).item_metadata.tree))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in leaves}


def pieces(folder):
    """Names of the pieces of arrays in a database of Orbax: of one process, or of all."""
    return set(ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result().list().result())


def saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def killed(clips, tmp_path_factory):
    """Two processes; the second is killed after four steps. → workdir, exit code, stderr and delay of the first."""
    workdir = tmp_path_factory.mktemp("killed")
    metrics = workdir / "metrics.jsonl"
    with started(flags_of(clips, workdir, 100_000), processes=2) as (first, second):
        deadline = time.monotonic() + SLOWEST_SECONDS
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4 and saved(workdir)):
            assert first.poll() is None and second.poll() is None, first.communicate()[1] + second.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second.send_signal(signal.SIGKILL)
        began = time.monotonic()
        said = first.communicate(timeout=60)[1]
        return workdir, first.returncode, said, time.monotonic() - began


@pytest.fixture(scope="module")
def alone(clips, killed, tmp_path_factory):
    """The same run on one process with eight devices, unbroken: to three steps after the last checkpoint."""
    workdir = tmp_path_factory.mktemp("alone")
    assert train.main(flags_of(clips, workdir, saved(killed[0])[-1] + 3)) == 0
    return workdir


def test_the_survivor_of_a_kill_leaves_with_a_sentence(killed):
    _, code, said, seconds = killed
    assert code == 1 and seconds < 30
    assert "error: process 1 on " in said and " is gone; start the run again" in said
    assert "Traceback" not in said


def test_two_processes_have_the_losses_of_one(killed, alone):
    ours, theirs = losses(killed[0]), losses(alone)
    assert len(ours) >= 4
    for step in sorted(ours.keys() & theirs.keys()):
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step


def test_what_two_processes_write_is_there_once(killed):
    rows = [json.loads(line)["step"] for line in (killed[0] / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))
    folder = killed[0] / "checkpoints" / str(saved(killed[0])[-1]) / "params"
    first, second = (pieces(folder / f"ocdbt.process_{process}") for process in range(2))
    assert first and second and not first & second and first | second == pieces(folder)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_run_goes_on_with_another_number_of_processes(killed, alone, clips, tmp_path, processes):
    workdir = tmp_path / "resumed"
    shutil.copytree(killed[0], workdir)
    last = saved(workdir)[-1]
    flags = [*flags_of(clips, workdir, last + 3), "--export", str(tmp_path / "out"), "--export_dtype=float32"]
    if processes == 1:
        assert train.main(flags) == 0
    else:
        (tmp_path / "bin").mkdir()
        assert through_slurm(flags, workdir, processes, tmp_path / "bin") == 0
        logs = {path.name.rpartition("-")[2]: path.read_text() for path in (workdir / "logs").iterdir()}
        assert sorted(logs) == [f"{i}.log" for i in range(processes)] and f"resumed step {last} " in logs["0.log"]
    ours, theirs = losses(workdir), losses(alone)
    for step in range(last + 1, last + 4):
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step
    assert saved(workdir)[-1] == last + 3
    weights = Folder(tmp_path / "out" / "denoiser")
    for name, array in parameters(workdir, last + 3, "ema").items():
        np.testing.assert_array_equal(weights.read(name), array, err_msg=name)
