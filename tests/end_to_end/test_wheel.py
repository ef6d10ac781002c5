"""A wheel of the repository, unpacked outside the checkout: its entries, configs and assets come along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_a_wheel_trains_and_samples_anywhere(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPO)]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XLA_FLAGS": ""}

    def run(module, *flags):
        command = [sys.executable, "-m", f"opensora_jax.{module}", *flags]
        done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(
        "train", "--config=configs/debug.py", f"--workdir={tmp_path / 'run'}", "--config.steps=1", "--config.data.batch_size=1",
        "--config.log.sample_every_steps=0", "--config.log.tensorboard=False",
    )  # fmt: skip
    run("sample", "--prompt=a red circle moving left", "--out=out", "--no-gif")  # the shipped pipeline
    assert list((tmp_path / "elsewhere" / "out").glob("*.mp4"))
