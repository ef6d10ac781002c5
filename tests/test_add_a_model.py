"""docs/add-a-model.md, done: three files beside the others (and a test: this one), nothing edited."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

REPO = Path(__file__).parents[1]

MODEL = '''"""A toy denoiser: one linear map of the channels."""

from dataclasses import dataclass

import jax
from flax import nnx

from opensora_jax.nn.linear import Linear


@dataclass(frozen=True)
class Config:
    in_channels: int = 4
    dtype: str = "float32"
    param_dtype: str = "float32"


PRESETS = {"Toy-S": Config()}
REPOSITORIES = {"Toy-S": "someone/toy"}


def build(cfg, *, rngs):
    return Toy(cfg, rngs=rngs)


def inputs(cfg, shape):
    size = (shape.batch, shape.frames, shape.height, shape.width, cfg.in_channels)
    return {"x": jax.ShapeDtypeStruct(size, "float32"), "t": jax.ShapeDtypeStruct((shape.batch,), "float32")}


class Toy(nnx.Module):
    def __init__(self, cfg, *, rngs):
        self.mix = Linear(cfg.in_channels, cfg.in_channels, rngs=rngs)

    def __call__(self, x, t):
        return self.mix(x) * t[:, None, None, None, None]
'''
WEIGHTS = '''"""The toy's own names."""

from opensora_jax.weights.engine import linear

RULES = [*linear("channel_mixer", "mix")]


def recognise(shapes, config):
    return "channel_mixer.weight" in shapes


def config_from(shapes, config):
    return {"in_channels": shapes["channel_mixer.weight"][1]}
'''
ADAPTER = '''"""The toy as someone recorded it."""

from opensora_jax.verify.case import Adapter, channels_first, channels_last


def replay(case, run):
    network, params, _ = case.load("models", "toy")
    given = case.tensors(run)
    return {"out": channels_first(network(params, channels_last(given["x"]), given["t"]))}


FAMILIES = {"someones_toy": Adapter("toy", replay)}
'''


def record(folder, weights):
    """What the toy of PyTorch would give: x [B, C, T, H, W]."""
    x, t = np.random.default_rng(0).normal(size=(2, 3, 1, 2, 2)).astype(np.float32), np.float32([1, 2])
    mixed = np.einsum("oc,bcthw->bothw", weights["channel_mixer.weight"], x) + 1
    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    save_file({"x": x, "t": t}, folder / "inputs.safetensors")
    save_file({"out": mixed * t[:, None, None, None, None]}, folder / "outputs.safetensors")
    case = {"case": "toy_a", "family": "someones_toy", "config": {}, "runs": {"r0": {}}, "weights": True}
    case |= {"outputs": {"out": {"tolerance": {"max_abs": 1e-4, "rel_l2": 1e-5}}}}
    (folder / "case.json").write_text(json.dumps(case))


def test_three_files_make_a_family(tmp_path):
    package = tmp_path / "opensora_jax"
    shutil.copytree(REPO / "opensora_jax", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (package / "models" / "toy.py").write_text(MODEL)
    (package / "weights" / "toy.py").write_text(WEIGHTS)
    (package / "verify" / "adapters" / "toy.py").write_text(ADAPTER)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*words):
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "toy             Toy-S                             someone/toy" in run("opensora_jax.convert", "--list")
    weights = {
        "channel_mixer.weight": np.arange(9, dtype=np.float32).reshape(3, 3),
        "channel_mixer.bias": np.ones(3, np.float32),
    }
    save_file(weights, tmp_path / "released.safetensors")
    run("opensora_jax.convert", "--from=released.safetensors", "--to=ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["family"] == "toy"
    run("opensora_jax.convert", "--to-torch", "--from=ours", "--to=back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(np.array_equal(back[name], array) for name, array in weights.items())
    record(tmp_path / "cases" / "toy_a", weights)
    assert "1 of 1 cases ok" in run("opensora_jax.verify", "cases")
