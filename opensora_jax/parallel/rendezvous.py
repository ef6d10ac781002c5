"""A roll call before JAX starts: every process reports to process 0, and a time-out names those that did not.

JAX's own start only says that time ran out. The call uses the coordinator's port, which JAX takes over right after; its
connections stay open as the run's lifeline.
"""

import socket
import time

from opensora_jax.common.errors import UserError

ALL_HERE = "all here"
Lines = dict[int, tuple[socket.socket, str]]  # process → connection, name of its machine


def roll_call(address: str, count: int, index: int, seconds: float) -> Lines:
    """Returns on every process when all are there; else every process that came raises the same sentence."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise UserError(f"COORDINATOR_ADDRESS={address!r} must be host:port")
    deadline = time.monotonic() + seconds
    found = _call(int(port), count, deadline, seconds) if index == 0 else _report(host, int(port), index, deadline)
    verdict, lines = found
    if verdict != ALL_HERE:
        raise UserError(verdict)
    return lines


def _call(port: int, count: int, deadline: float, seconds: float) -> tuple[str, Lines]:
    """Process 0: waits for the others and tells them how it ended."""
    came: Lines = {}
    connections = []
    verdict = ""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        return f"process 0 cannot listen on port {port} ({error.strerror}); give COORDINATOR_ADDRESS another port", {}
    with server:
        while len(came) < count - 1 and not verdict:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                number, _, name = connection.recv(300).decode().strip().partition(" ")
            except (TimeoutError, OSError, UnicodeDecodeError):
                if time.monotonic() < deadline:
                    continue  # a port scan or a broken connection
                missing = [str(i) for i in range(1, count) if i not in came]
                verdict = (
                    f"{len(missing)} of {count} processes did not come in {seconds:.0f} s: missing {', '.join(missing)}"
                )
                continue
            if not number.isdigit() or not 0 < int(number) < count:
                continue
            if int(number) in came:
                verdict = (
                    f"process {number} came twice, from {came[int(number)][1]} and {name}; give each its PROCESS_ID"
                )
            came[int(number)] = (connection, name)
            connections.append(connection)
    verdict = verdict or ALL_HERE
    for connection in connections:
        connection.sendall(f"{verdict}\n".encode())
        if verdict != ALL_HERE:
            connection.close()
    return verdict, came


def _report(host: str, port: int, index: int, deadline: float) -> tuple[str, Lines]:
    """Every other process: says that it is here, and waits for the end of the call."""
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.sendall(f"{index} {socket.gethostname()}\n".encode())
            connection.settimeout(max(1.0, deadline + 10 - time.monotonic()))
            if verdict := _line(connection):
                return verdict, {0: (connection, host)}
            connection.close()
        except OSError:
            pass
        time.sleep(0.2)
    return f"process {index} could not reach process 0 at {host}:{port}; is it running, and is the port open?", {}


def _line(connection: socket.socket) -> str:
    """One line, byte by byte: what comes after it belongs to the lifeline."""
    text = b""
    while (byte := connection.recv(1)) not in (b"", b"\n"):
        text += byte
    return text.decode()
