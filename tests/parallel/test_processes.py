"""Two real processes of two CPU devices each meet through the environment and agree (gloo on loopback)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from opensora_jax.parallel import runtime
runtime.start()
import jax
print(jax.process_count(), jax.device_count(), runtime.any_process(jax.process_index() == 1), runtime.any_process(False))
"""


def test_two_processes_meet_and_agree():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    env |= {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "RENDEZVOUS_SECONDS": "60"}
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=env | {"PROCESS_ID": str(i)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = [start(0), start(1)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [out.split()[-4:] for out, _ in said] == [["2", "4", "True", "False"]] * 2, said
