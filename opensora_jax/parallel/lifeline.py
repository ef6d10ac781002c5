"""A line between the processes of a run: when one dies or fails, the others say which, and leave too.

Without it the survivors hang in their next collective until JAX's heartbeat ends them with a page of text. The roll
call's connections simply stay open: process 0 holds one to each other process. A process that ends well says goodbye,
one that fails sends its sentence, and a line that breaks without either is a death; process 0 passes it on.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time

GONE = 1  # exit code of the survivors of a death: launchers start the run again (2 is a mistake of the user's)
NOTICE_SECONDS = 5.0  # a broken collective may be seen before the broken line


class Lifeline:
    def __init__(self, index: int, lines: dict[int, tuple[socket.socket, str]]):
        """lines: process → connection and name of its machine; all of them on process 0, that to 0 on the others."""
        self.index, self.lines = index, lines
        self.open = set(lines)
        self.ending = threading.Lock()
        for number, (line, _) in lines.items():
            _keep_alive(line)
            threading.Thread(target=self._watch, args=(number,), daemon=True, name=f"line to {number}").start()

    def goodbye(self) -> None:
        """This process ends well."""
        self.ending.acquire()  # what the lines do from here on no longer matters
        self._tell({"end": 0})

    def failed(self, code: int, sentence: str, details: str = "") -> None:
        """This process ends with an error, which the others repeat; does not return."""
        if details:
            time.sleep(NOTICE_SECONDS)  # if a peer died, the thread that watches it leaves with a better sentence
        self.ending.acquire()
        if details:
            print(details, file=sys.stderr)
        self._leave(code, f"process {self.index} on {socket.gethostname()} stopped: {sentence}")

    def _watch(self, number: int) -> None:
        line, host = self.lines[number]
        try:
            with line.makefile("r") as messages:
                text = messages.readline()
            said = json.loads(text) if text.endswith("\n") else None
        except (OSError, ValueError):
            said = None
        self.open.discard(number)
        if said is None:
            gone = f"process {number} on {host} is gone; start the run again: it goes on from its last checkpoint"
            said = {"end": GONE, "says": gone}
        if said["end"] and self.ending.acquire(blocking=False):
            print(f"error: {said['says']}", file=sys.stderr)
            self._leave(said["end"], said["says"])

    def _leave(self, code: int, sentence: str) -> None:
        self._tell({"end": code, "says": sentence})
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # neither JAX's shutdown, which waits for everybody, nor threads inside a broken collective

    def _tell(self, message: dict) -> None:
        for number in sorted(self.open):
            with contextlib.suppress(OSError):  # gone as well
                self.lines[number][0].sendall((json.dumps(message) + "\n").encode())


def _keep_alive(line: socket.socket) -> None:
    """A machine that loses its power closes nothing: found out within a minute."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
