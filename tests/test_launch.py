"""launch/: each file against stand-ins of its cluster's commands, down to the command that trains."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LAUNCH = REPO / "launch"

# A run that says how it was started; it crashes, errs, or waits for SIGTERM where ARGS ask for it.
PYTHON = """#!/bin/bash
[ "$1" = -c ] && { cp "$3" "$UPLOADED/$(basename "$4")"; exit; }
[ "$2" = venv ] && { mkdir -p "$3/bin"; touch "$3/bin/activate"; exit; }
echo "run $* by ${SLURM_PROCID:-none} of ${SLURM_NTASKS:-none}"
case "$*" in
  *" crash") [ -e "$CRASHED" ] || { touch "$CRASHED"; exit 1; } ;;
  *" mistake") exit 2 ;;
  *" wait") trap 'echo saved; exit 0' TERM; touch "$CRASHED"; while true; do sleep 0.05; done ;;
esac
"""
COMMANDS = {
    "python": PYTHON,
    "python3": PYTHON,
    "pip": "#!/bin/bash\n",
    "sbatch": '#!/bin/bash\necho "$@" > "$SAID"\nexport SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost\nbash "${@: -1}"\n',
    "srun": """#!/bin/bash
export SLURM_NTASKS=2
while [[ $1 == --* ]]; do shift; done
for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || code=$?; done
exit ${code:-0}
""",
    "gcloud": """#!/bin/bash
case "$*" in
  *" scp "*) cp "$5" /dev/null && cp "$5" "$SAID" ;;
  *" ssh "*) for last; do [[ $last == --command=* ]] && command=${last#--command=}; done
    bash -c "${command/\\/tmp\\/opensora_jax.tar.gz/$SAID}" ;;
esac
""",
    "xpk": """#!/bin/bash
echo "$@" > "$SAID"
for word; do [[ $word == --command=* ]] && bash -c "${word#--command=}"; done
""",
}


@pytest.fixture
def stand_in(tmp_path):
    """The environment in which a launch file believes itself on a cluster."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    (tmp_path / "bucket").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "RESTART_SECONDS": "0"}
    env |= {"CRASHED": str(tmp_path / "crashed"), "SAID": str(tmp_path / "said"), "UPLOADED": str(tmp_path / "bucket")}
    return env | {"WORKDIR": str(tmp_path / "run"), "CONFIG": "configs/debug.py", "ARGS": "--config.steps=3 --debug"}


def launch(file, env, *flags):
    return subprocess.run(
        ["bash", LAUNCH / file, *flags], cwd=REPO, env=env, capture_output=True, text=True, timeout=60
    )


def logs(env):
    return {path.name: path.read_text() for path in (Path(env["WORKDIR"]) / "logs").iterdir()}


COMMAND = "run -m opensora_jax.train --config=configs/debug.py --workdir={} --config.steps=3 --debug"


def test_a_process_and_its_log(stand_in):
    done = launch("run.sh", stand_in | {"PROCESS_ID": "3"})
    assert done.returncode == 0 and COMMAND.format(stand_in["WORKDIR"]) in done.stdout
    (name, text), = logs(stand_in).items()  # fmt: skip
    assert name.endswith("-3.log") and text == done.stdout


@pytest.mark.parametrize(
    ("what", "restarts", "code", "runs"), [("crash", 1, 0, 2), ("crash", 0, 1, 1), ("mistake", 5, 2, 1)]
)
def test_a_crash_is_repeated_and_a_mistake_is_not(stand_in, what, restarts, code, runs):
    done = launch("run.sh", stand_in | {"ARGS": what, "RESTARTS": str(restarts)})
    assert done.returncode == code
    assert sum(text.count("run -m") for text in logs(stand_in).values()) == runs


def test_a_preemption_reaches_the_run(stand_in):
    process = subprocess.Popen(
        ["bash", LAUNCH / "run.sh"], cwd=REPO, env=stand_in | {"ARGS": "wait"}, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not Path(stand_in["CRASHED"]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert b"saved" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_logs_of_a_bucket(stand_in):
    assert launch("run.sh", stand_in | {"WORKDIR": "gs://mine/run"}).returncode == 0
    (log,) = Path(stand_in["UPLOADED"]).iterdir()
    assert COMMAND.format("gs://mine/run") in log.read_text()


def test_slurm(stand_in):
    done = launch("slurm.sh", stand_in, "--nodes=2")
    assert done.returncode == 0, done.stderr
    said = Path(stand_in["SAID"]).read_text()
    assert f"--output={stand_in['WORKDIR']}/logs/slurm-%j.log --nodes=2" in said
    texts = sorted(logs(stand_in).values())
    assert len(texts) == 2
    for i, text in enumerate(texts):
        assert text == f"{COMMAND.format(stand_in['WORKDIR'])} by {i} of 2\n"


def test_tpu_vm(stand_in):
    env = stand_in | {"TPU": "t", "ZONE": "z", "PROJECT": "p", "WORKDIR": "gs://mine/run"}
    done = launch("tpu_vm.sh", env)
    assert done.returncode == 0, done.stderr
    assert COMMAND.format("gs://mine/run") in done.stdout
    assert (Path(env["HOME"]) / "opensora_jax" / "pyproject.toml").exists()


def test_xpk(stand_in):
    env = stand_in | {"CLUSTER": "c", "TPU": "v6e-64", "IMAGE": "i"}
    done = launch("xpk.sh", env)
    assert done.returncode == 0 and COMMAND.format(env["WORKDIR"]) in done.stdout
    said = Path(env["SAID"]).read_text()
    assert said.startswith("workload create --cluster=c --workload=opensora-jax --tpu-type=v6e-64 --num-slices=1")


def test_jobset_and_sky(stand_in):
    import string

    import yaml

    env = stand_in | {"IMAGE": "i", "HOSTS": "4", "TPU_TYPE": "tpu-v6e-slice", "TOPOLOGY": "4x4"}
    job = yaml.safe_load(string.Template((LAUNCH / "jobset.yaml").read_text()).substitute(env))
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    assert pod["completions"] == pod["parallelism"] == 4
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    done = subprocess.run(container["command"], cwd=REPO, env=env | given, capture_output=True, text=True)
    assert COMMAND.format(env["WORKDIR"]) in done.stdout, json.dumps(container)

    sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    run = sky["run"].replace(". .venv/bin/activate", 'echo "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID"')
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", run], cwd=REPO, env=env | nodes, capture_output=True, text=True)
    assert "10.0.0.1:8476 2 1" in done.stdout and COMMAND.format(env["WORKDIR"]) in done.stdout


def test_a_missing_variable_is_named(stand_in):
    for file, name in (("tpu_vm.sh", "TPU"), ("xpk.sh", "CLUSTER")):
        done = launch(file, stand_in)
        assert done.returncode and f"{name}: " in done.stderr
