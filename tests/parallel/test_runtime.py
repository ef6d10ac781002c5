"""Who starts together, by the environment of each launcher; the roll call names who is missing."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import overlap
from opensora_jax.parallel.rendezvous import roll_call
from opensora_jax.parallel.runtime import Peers, first_host, peers

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_ID": "4099", "SLURM_LOCALID": "1"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, None),
        (
            {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"} | SLURM,
            Peers("environment", 2, 1, "a:1"),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, Peers("TPU pod", 2)),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "MEGASCALE_NUM_SLICES": "2"}, Peers("TPU pod", 4)),
        (OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:3"}, Peers("Open MPI", 2, 1, local_device=0)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[01-04]"}, Peers("SLURM", 4, 3, "n01:61443")),
        (
            SLURM | {"SLURM_STEP_NODELIST": "gpu7,gpu9", "SLURM_NTASKS_PER_NODE": "2"},
            Peers("SLURM", 4, 3, "gpu7:61443", 1),
        ),
        (SLURM, None),  # inside an allocation, but not started by srun
    ],
)
def test_launchers(env, expected):
    assert peers(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"COORDINATOR_ADDRESS": "a:1"}, "NUM_PROCESSES and PROCESS_ID is not; set all three"),
        ({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"}, "NUM_PROCESSES='two' must be"),
        ({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "process 2 of 2; they count from 0"),
        (OMPI, "Open MPI did not say where process 0 is"),
    ],
)
def test_a_wrong_environment_is_one_sentence(env, message):
    with pytest.raises(UserError, match=message) as caught:
        peers(env)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nodes", ["node003", "node003,x", "node[003-7,9],x", "node[003,5]"])
def test_first_host(nodes):
    assert first_host(nodes) == "node003"


def call(indices, count, seconds):
    """What each process got: nothing, or the sentence."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    def one(index):
        try:
            roll_call(address, count, index, seconds)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, indices))


def test_all_come():
    assert call([2, 0, 1], 3, 20) == [None] * 3


def test_the_missing_are_named_on_every_process():
    assert set(call([0, 2], 4, 2)) == {"2 of 4 processes did not come in 2 s: missing 1, 3"}


def test_two_with_one_number():
    assert all("process 1 came twice" in said for said in call([0, 1, 1], 3, 20))


def test_without_process_0():
    assert "could not reach process 0 at 127.0.0.1" in call([1], 2, 1)[0]


def test_flags_for_overlap_leave_the_users_alone():
    own = {"XLA_FLAGS": "--xla_dump_to=d --xla_gpu_enable_pipelined_all_gather=false"}
    found = overlap.added(own, lambda package: "cuda" in package)
    assert list(found) == ["XLA_FLAGS"]
    flags = found["XLA_FLAGS"].split()
    assert flags[:2] == own["XLA_FLAGS"].split() and "--xla_gpu_enable_latency_hiding_scheduler=true" in flags
    assert "--xla_gpu_enable_pipelined_all_gather=true" not in flags
    assert "--xla_tpu_overlap_compute_collective_tc=true" in overlap.added({}, lambda _: True)["LIBTPU_INIT_ARGS"]
    assert overlap.added(found, lambda package: "cuda" in package) == {}
    assert overlap.added({"JAX_PLATFORMS": "cpu"}, lambda _: True) == {}


def test_several_devices_of_a_cpu_get_two_threads_each():
    flag = "--xla_force_host_platform_device_count"
    cores = os.cpu_count()
    assert overlap.threads({}) == overlap.threads({"XLA_FLAGS": f"{flag}=1"}) == {}
    assert overlap.threads({"XLA_FLAGS": f"--a=b {flag}=2 {flag}=4"}) == {"NPROC": str(max(8, cores))}
    assert overlap.threads({"XLA_FLAGS": f"{flag}=4", "NPROC": "3"}) == {}
