"""Starting JAX on one machine or many, and the few things that all processes must agree on."""

import os

import jax
import numpy as np

from opensora_jax.common.errors import UserError

MULTI_PROCESS = (
    "SLURM_JOB_ID",
    "OMPI_MCA_orte_hnp_uri",
    "JOB_COMPLETION_INDEX",
    "COORDINATOR_ADDRESS",
    "TPU_WORKER_HOSTNAMES",
)


def start() -> None:
    """Joins the other processes where the environment says that there are some, else does nothing."""
    if jax.distributed.is_initialized():
        return
    count = int(os.environ.get("NUM_PROCESSES", os.environ.get("SLURM_NTASKS", "1")))
    hosts = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if count == 1 and len(hosts) < 2 and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        return
    explicit = {}
    if "COORDINATOR_ADDRESS" in os.environ:
        explicit = {
            "coordinator_address": os.environ["COORDINATOR_ADDRESS"],
            "num_processes": count,
            "process_id": int(os.environ["PROCESS_ID"]),
        }
    try:
        jax.distributed.initialize(**explicit, initialization_timeout=int(os.environ.get("RENDEZVOUS_SECONDS", "300")))
    except Exception as error:
        raise UserError(
            f"the processes did not find each other ({error}); see docs/sharding.md, section Launch"
        ) from None


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
