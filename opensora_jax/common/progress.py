"""A live bar on a terminal, plain lines otherwise; the same object for training, sampling, encoding, converting."""

import sys
import time


def duration(seconds: float) -> str:
    seconds = int(max(0, seconds))
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


_showing: list["Progress"] = []  # bars of this process, the innermost last


def say(line: str) -> None:
    """A line on stderr; above the bar, when one is showing."""
    bars = [bar for bar in _showing if not (bar.quiet or bar.stream.closed)]
    if bars:
        bars[-1].write(line)
    else:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """with Progress("sampling", total=30) as bar: bar.update(1, "loss 0.12")"""

    def __init__(
        self, title: str, total: int, *, start: int = 0, stream=None, every_seconds: float = 10.0, quiet=False
    ):
        self.title, self.total, self.done, self.start = title, total, start, start
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every = 0.1 if self.live else every_seconds
        self.quiet = quiet
        self.began = self.shown = time.monotonic()
        _showing.append(self)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self in _showing:
            _showing.remove(self)
        if self.quiet:
            return
        self._show("" if kind is None else "stopped", force=True)
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def update(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.note = note or getattr(self, "note", "")
        if not self.quiet and time.monotonic() - self.shown >= self.every:
            self._show(self.note)

    def write(self, line: str) -> None:
        """A line of its own, above the bar, which is drawn again below it."""
        if self.quiet:
            return
        self.stream.write(("\r\x1b[K" if self.live else "") + line + "\n")
        self.stream.flush()
        if self.live:
            self._show("")

    @property
    def eta(self) -> float:
        made = self.done - self.start
        return (time.monotonic() - self.began) / made * (self.total - self.done) if made else 0.0

    def _show(self, note: str, force: bool = False) -> None:
        self.shown = time.monotonic()
        note = note or getattr(self, "note", "")
        share = self.done / self.total if self.total else 1.0
        elapsed = duration(self.shown - self.began)
        tail = f"{elapsed}, {duration(self.eta)} left" if self.done < self.total else elapsed
        text = f"{self.title} {self.done}/{self.total} [{tail}]" + (f"  {note}" if note else "")
        if self.live:
            width = 24
            bar = "█" * int(share * width) + "░" * (width - int(share * width))
            self.stream.write(f"\r\x1b[K{bar} {text}")
        else:
            self.stream.write(text + "\n")
        self.stream.flush()
