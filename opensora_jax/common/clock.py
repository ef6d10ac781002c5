"""Where the wall time of a loop goes."""

import time
from contextlib import contextmanager


class Stopwatch:
    """Adds up named spans since the last `collect`."""

    def __init__(self):
        self.spans: dict[str, float] = {}
        self.began = time.monotonic()

    @contextmanager
    def span(self, name: str):
        start = time.monotonic()
        try:
            yield
        finally:
            self.spans[name] = self.spans.get(name, 0.0) + time.monotonic() - start

    def collect(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, and the spans in them."""
        now = time.monotonic()
        total, spans = now - self.began, self.spans
        self.began, self.spans = now, {}
        return total, spans
