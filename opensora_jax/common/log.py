"""One logger for the package; process 0 speaks, the others only warn."""

import logging
import os

from opensora_jax.common.progress import say

logger = logging.getLogger("opensora_jax")


class Handler(logging.Handler):
    """Lines above the progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def setup(process_index: int = 0) -> None:
    """Plain lines on stderr; OPENSORA_LOG=debug shows more."""
    level = getattr(logging, os.environ.get("OPENSORA_LOG", "info").upper(), logging.INFO)
    handler = Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if process_index == 0 else max(level, logging.WARNING))
