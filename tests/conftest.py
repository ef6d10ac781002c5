"""Shared by the whole suite: CPU, full float32, eight fake devices, one compilation cache."""

import os
from pathlib import Path

from opensora_jax.parallel import overlap

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run for milliseconds and compile for seconds, so the compiler is told not to try.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    + os.environ.get("XLA_FLAGS", "")
)
os.environ.update(overlap.threads(os.environ))
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
