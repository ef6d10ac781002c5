"""Shared by the whole suite: CPU, full float32, eight fake devices, one compilation cache."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run for milliseconds and compile for seconds, so the compiler is told not to try.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    + os.environ.get("XLA_FLAGS", "")
)
# XLA's threads on a CPU. A collective holds one while it waits: with one a device, as by default, two collectives that do
# not depend on each other take them all when devices begin with different ones, and wait for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The whole recorded set when it lies beside the checkout, else the part that ships with the repository."""
    beside = REPO.parent / "shared" / "goldens" / "open"
    return beside if beside.is_dir() else REPO / "tests" / "goldens" / "open"
