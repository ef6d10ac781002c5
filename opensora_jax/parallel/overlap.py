"""What runs ask of XLA, so that collectives run beside computation and never lock a CPU up; plans compile with the same flags.

Imports no jax: the compilers read these variables when they are loaded.
"""

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Mapping

TPU = "libtpu"

# Beyond the compilers' defaults: package that is there → variable, flags. Not --xla_tpu_enable_async_collective_fusion:
# all chips but v5e refuse to compile with it (libtpu 0.0.51, November 2026).
FLAGS = {
    TPU: (
        "LIBTPU_INIT_ARGS",
        (
            "--xla_tpu_enable_latency_hiding_scheduler=true",
            "--xla_enable_async_all_gather=true",
            "--xla_tpu_overlap_compute_collective_tc=true",
            # Where all devices gather, it would be the sum of zeros otherwise: twice the bytes.
            "--xla_tpu_prefer_async_allgather_to_allreduce=true",
            # On v5p, v6e and tpu7x the sparse cores exchange beside computation; other chips ignore it.
            "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
            "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
            "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
            "--xla_tpu_enable_sparse_core_collective_offload_dense_all_to_all=true",
        ),
    ),
    "jax_plugins.xla_cuda": (
        "XLA_FLAGS",
        (
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_enable_while_loop_double_buffering=true",
        ),
    ),
}


def installed(package: str) -> bool:
    """jax_plugins.xla_cuda stands for jax_plugins.xla_cuda12, xla_cuda13, ..."""
    parent, _, name = package.rpartition(".")
    try:
        where = importlib.import_module(parent).__path__ if parent else None
    except ImportError:
        return False
    return any(found.name.startswith(name) for found in pkgutil.iter_modules(where))


def added(env: Mapping[str, str], installed: Callable[[str], bool] = installed) -> dict[str, str]:
    """What to add to a run's environment before JAX starts."""
    if (env.get("JAX_PLATFORMS") or "").startswith("cpu"):
        return {}
    return {
        variable: text
        for package, (variable, _) in FLAGS.items()
        if (text := with_flags(env, package)) != env.get(variable, "") and installed(package)
    }


def threads(env: Mapping[str, str]) -> dict[str, str]:
    """Two threads a device of a CPU that counts as several, as XLA reads their number.

    By default it is one a core, or one a device where these are more. Collectives and launches hold a thread while they
    wait, and a run whose threads all wait ends with "Termination timeout for `all reduce`" (jaxlib 0.10.2).
    """
    devices = max(
        map(int, re.findall(r"--xla_force_host_platform_device_count=(\d+)", env.get("XLA_FLAGS", ""))), default=1
    )
    return {"NPROC": str(max(2 * devices, os.cpu_count() or 1))} if devices > 1 and "NPROC" not in env else {}


def with_flags(env: Mapping[str, str], package: str) -> str:
    """The variable's value with the flags; one that the user set, either way, stays as it is."""
    variable, flags = FLAGS[package]
    given = env.get(variable, "")
    named = {flag.partition("=")[0] for flag in given.split()}
    return " ".join([given, *(flag for flag in flags if flag.partition("=")[0] not in named)]).strip()
