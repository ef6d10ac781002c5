"""Starting JAX on one machine or many, and the few things that all processes must agree on.

`start()` reads the environment, in this order: COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID (any launcher, and the
JobSet of launch/); TPU pods; Open MPI; SLURM. Before that it asks the compilers to overlap communication with compute
(overlap.py). docs/sharding.md, section Launch, has both tables.
"""

import atexit
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from opensora_jax.common.errors import UserError, at_failure
from opensora_jax.parallel import overlap
from opensora_jax.parallel.lifeline import Lifeline
from opensora_jax.parallel.rendezvous import roll_call

EXPLICIT = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Peers:
    """This process among its peers. No address: JAX asks the platform itself (TPU pods)."""

    launcher: str
    count: int
    index: int | None = None
    address: str | None = None
    local_device: int | None = None  # where a launcher starts one process a GPU


def peers(env: Mapping[str, str]) -> Peers | None:
    """Who starts together, by the environment; None where this process is alone."""
    given = [name for name in EXPLICIT if env.get(name)]
    if "COORDINATOR_ADDRESS" in given:
        absent = [name for name in EXPLICIT if name not in given]
        if absent:
            raise UserError(f"COORDINATOR_ADDRESS is set, but {' and '.join(absent)} is not; set all three")
        found = Peers("environment", *_numbers(env, "NUM_PROCESSES", "PROCESS_ID"), env["COORDINATOR_ADDRESS"])
    elif hosts := [name for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]:
        slices = _numbers(env, "MEGASCALE_NUM_SLICES")[0] if env.get("MEGASCALE_NUM_SLICES") else 1
        found = Peers("TPU pod", len(hosts) * slices)
    elif "OMPI_COMM_WORLD_SIZE" in env:
        count, index, local = _numbers(
            env, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
        )
        if count > 1 and "OMPI_MCA_orte_hnp_uri" not in env:
            raise UserError(
                "Open MPI did not say where process 0 is; set COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID"
            )
        found = Peers("Open MPI", count, index, local_device=local)
    elif "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        count, index, job, local = _numbers(env, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_LOCALID")
        port = 61440 + job % 4096  # each job of a machine its own
        many = int(env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0]) > 1
        address = f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}"
        found = Peers("SLURM", count, index, address, local if many else None)
    else:
        return None
    if found.index is not None and not 0 <= found.index < found.count:
        raise UserError(f"{found.launcher}: process {found.index} of {found.count}; they count from 0")
    return found if found.count > 1 else None


def first_host(nodes: str) -> str:
    """SLURM's node list: node[003-007,9],other → node003."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no machine")
    return match[1] + (match[2] or "")


def start() -> None:
    """Joins the other processes where the environment says that there are some; alone it only sets flags."""
    os.environ.update(overlap.added(os.environ) | overlap.threads(os.environ))
    if jax.distributed.is_initialized():
        return
    found = peers(os.environ)
    if found is None:
        return
    if (os.environ.get("JAX_PLATFORMS") or "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = int(os.environ.get("RENDEZVOUS_SECONDS", TIMEOUT_SECONDS))
    lines = {}
    if found.address and found.index is not None:
        lines = roll_call(found.address, found.count, found.index, seconds)
    known = {}  # the rest JAX learns from the platform itself
    if found.address:
        known = {"coordinator_address": found.address, "num_processes": found.count, "process_id": found.index}
    if found.local_device is not None:
        known["local_device_ids"] = [found.local_device]
    try:
        jax.distributed.initialize(**known, initialization_timeout=seconds)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{found.launcher}: the {found.count} processes did not meet in {seconds} s ({first})"
        ) from None
    if lines:
        lifeline = Lifeline(jax.process_index(), lines)
        at_failure.append(lifeline.failed)
        atexit.register(lifeline.goodbye)  # runs before JAX's own end, which was registered before it


def _numbers(env: Mapping[str, str], *names: str) -> tuple[int, ...]:
    for name in names:
        if not env.get(name, "").isdigit():
            raise UserError(f"{name}={env.get(name, '')!r} must be a number")
    return tuple(int(env[name]) for name in names)


def set_precision(name: str) -> None:
    """Of float32 matmuls; bf16 compute is the networks' own dtype."""
    jax.config.update("jax_default_matmul_precision", None if name == "default" else name)


def any_process(flag: bool) -> bool:
    """True when any process says so; every process must call it in the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def barrier(name: str) -> None:
    """Waits for every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
