"""The progress bar: live on a terminal, plain lines elsewhere, and lines of others above it."""

import io

from opensora_jax.common import log, progress
from opensora_jax.common.progress import Progress, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after these characters."""
    lines = [""]
    for piece in text.replace("\x1b[K", "").split("\n"):
        lines[-1] = piece.split("\r")[-1]
        lines.append("")
    return lines[:-1]


def test_lines_stand_above_a_live_bar():
    out = Terminal()
    with Progress("train", 4, stream=out, every_seconds=0) as bar:
        bar.every = 0
        bar.update(note="loss 0.5")
        say("data: skipped record a.mp4")
        bar.update()
        log.setup()
        log.logger.info("a sentence")
        bar.update(2)
    shown = screen(out.getvalue())
    assert shown[0] == "data: skipped record a.mp4" and shown[1].endswith("a sentence")
    assert shown[2].startswith("█" * 24 + " train 4/4 [") and shown[2].endswith("loss 0.5") and shown[3:] == [""]


def test_elsewhere_it_writes_plain_lines(capsys):
    with Progress("encode", 3, every_seconds=0.0) as bar:
        bar.every = 0
        bar.update()
        say("something")
    said = capsys.readouterr().err
    assert "\r" not in said and "█" not in said
    assert [line.split(" [")[0] for line in said.splitlines()] == ["encode 1/3", "something", "encode 1/3"]


def test_a_silent_process_still_speaks_up(capsys):
    with Progress("train", 3, quiet=True) as bar:
        bar.update()
        say("data: skipped record b.mp4")
    assert capsys.readouterr().err == "data: skipped record b.mp4\n" and not progress._showing
