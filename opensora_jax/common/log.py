"""One logger for the package; process 0 speaks, the others only warn."""

import logging
import os
import sys

logger = logging.getLogger("opensora_jax")


def setup(process_index: int = 0) -> None:
    """Plain lines on stderr; OPENSORA_LOG=debug shows more."""
    level = getattr(logging, os.environ.get("OPENSORA_LOG", "info").upper(), logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if process_index == 0 else max(level, logging.WARNING))
