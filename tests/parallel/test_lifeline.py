"""What the other processes hear when one ends: well, with a sentence, or by kill -9."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from opensora_jax.common.errors import UserError, at_failure, guarded
from opensora_jax.parallel.lifeline import Lifeline
from opensora_jax.parallel.rendezvous import roll_call
address, index, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
lifeline = Lifeline(index, roll_call(address, 3, index, 60))
at_failure.append(lifeline.failed)
print("met", flush=True)
def main():
    if index == 2 and how == "mistake":
        raise UserError("no such file")
    if index == 2 and how == "bug":
        raise KeyError("x")
    if how != "well":
        time.sleep(60)
code = guarded(main)
lifeline.goodbye()
time.sleep(0.5 * index)
sys.exit(code)
"""


def run(how, kill=None):
    """Exit codes and what each of three processes wrote to stderr; seconds from the kill to the last exit."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, address, str(i), how],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = [start(i) for i in range(3)]
    try:
        began = time.monotonic()
        if kill is not None:
            for process in processes:
                assert process.stdout.readline() == "met\n"
            began = time.monotonic()
            processes[kill].send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=40)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said, time.monotonic() - began


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_on_the_others(killed):
    codes, said, seconds = run("sleep", kill=killed)
    assert codes[killed] == -signal.SIGKILL and seconds < 20
    for i in {0, 1, 2} - {killed}:
        assert codes[i] == 1 and said[i].startswith(f"error: process {killed} on ") and " is gone; start" in said[i]
        assert len(said[i].splitlines()) == 1


@pytest.mark.parametrize(("how", "code", "sentence"), [("mistake", 2, "no such file"), ("bug", 1, "KeyError: 'x'")])
def test_what_stops_one_stops_all_with_its_sentence(how, code, sentence):
    codes, said, _ = run(how)
    assert codes == [code] * 3
    assert sentence in said[2] and ("Traceback" in said[2]) == (how == "bug")
    for text in said[:2]:
        assert text.startswith("error: process 2 on ") and text.endswith(f" stopped: {sentence}\n"), text


def test_ends_that_are_well_disturb_nobody():
    assert run("well")[:2] == ([0, 0, 0], ["", "", ""])
