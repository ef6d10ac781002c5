"""Kernels, models and benchmarks import with jax, flax, optax, einops and numpy alone: they run on any GPU image."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What else the package or its extras bring, but for what flax itself needs.
REFUSED = """array_record av clu cv2 diffusers ftfy grain gradio huggingface_hub hypothesis libtpu matplotlib ml_collections
onnxruntime pandas PIL pyarrow pytest ray safetensors scenedetect sentencepiece tensorboardX tensorflow
tensorflow_datasets torch transformers usearch wandb"""
SCRIPT = f"""
import importlib, pkgutil, sys
refused = set({REFUSED.split()!r})

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Refuse())
for room in ("opensora_jax.kernels", "opensora_jax.models", "benchmarks"):
    package = importlib.import_module(room)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{{room}}.{{module.name}}")
        print(room, module.name)
"""


def test_kernels_models_and_benchmarks_need_few_packages():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"opensora_jax.kernels mosaic_gpu", "opensora_jax.models mmdit"} <= set(done.stdout.splitlines())
    assert "benchmarks attention" in done.stdout
