"""Names for intermediate activations, so that a port that goes astray can be found (verify, debugging).

`tap("t_emb", x)` returns x; inside `with record() as taps:` it also keeps it. Recording works under jit when the
recorder is opened and its content returned inside the jitted function; stacks then run unrolled.
"""

from contextlib import contextmanager
from contextvars import ContextVar

_recorder: ContextVar[dict | None] = ContextVar("taps", default=None)
_prefix: ContextVar[str] = ContextVar("tap_prefix", default="")


def tap(name: str, value):
    taps = _recorder.get()
    if taps is not None:
        taps[_prefix.get() + name] = value
    return value


def recording() -> bool:
    return _recorder.get() is not None


@contextmanager
def record():
    taps: dict = {}
    token = _recorder.set(taps)
    try:
        yield taps
    finally:
        _recorder.reset(token)


@contextmanager
def scope(prefix: str):
    token = _prefix.set(_prefix.get() + prefix)
    try:
        yield
    finally:
        _prefix.reset(token)
