"""Block sizes of our kernels, by chip, kernel, pass and shape: blocks.json.

    python -m benchmarks.attention --tune --write       # on a GPU: times alternatives, writes the fastest
    python -m benchmarks.tpu_blocks --write             # without a TPU: compiles them, writes the shortest static schedule

Rows of the chip "any" are the rule where a chip has none: on TPUs the sizes that served all chips before the table, on GPUs
tiles as large as registers seemed to allow, never timed, of which only those of `mosaic_gpu` for heads of 128 were compiled
for sm_90a (`python -m benchmarks.gpu_compile`).
"""

import functools
import json
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from opensora_jax.kernels import spec

FILE = Path(__file__).with_name("blocks.json")
KEYS = ("chip", "kernel", "pass", "head_dim", "length")
# Fast memory that kernels may take: of 64 MiB on v5p and v7x, of 128 on others.
VMEM = {"v5p": 60 << 20, "v7x": 60 << 20}
_tried: ContextVar[tuple] = ContextVar("blocks_tried", default=())  # (kernel, pass), sizes


def vmem() -> int:
    """Of the TPU that this is traced for."""
    return VMEM.get(spec.chip(), 104 << 20)


@functools.cache
def table() -> list[dict]:
    return json.loads(FILE.read_text())


@contextmanager
def trying(kernel: str, **passes: tuple[int, ...]):
    """These sizes instead of the table's while tracing inside this block: `trying("flash_tpu", forward=(512, 4096))`."""
    token = _tried.set((*_tried.get(), *(((kernel, stage), sizes) for stage, sizes in passes.items())))
    try:
        yield
    finally:
        _tried.reset(token)


def find(kernel: str, stage: str, head_dim: int, length: int) -> tuple[int, ...]:
    """Of this chip's first row that fits, else the usual ones: a row serves heads and keys up to its own, and rows are in
    rising order."""
    tried = dict(_tried.get()).get((kernel, stage))
    return tried or _first(spec.chip(), kernel, stage, head_dim, length) or usual(kernel, stage, head_dim, length)


def usual(kernel: str, stage: str, head_dim: int, length: int) -> tuple[int, ...]:
    """Those of any chip."""
    found = _first("any", kernel, stage, head_dim, length)
    if found is None:
        raise KeyError(f"{FILE.name} has no row for {kernel} {stage} with heads of {head_dim} and {length} keys")
    return found


def _first(chip: str, kernel: str, stage: str, head_dim: int, length: int) -> tuple[int, ...] | None:
    for row in table():
        fits = head_dim <= row["head_dim"] and length <= row["length"]
        if fits and (row["chip"], row["kernel"], row["pass"]) == (chip, kernel, stage):
            return tuple(row["blocks"])
    return None


def write(rows: list[dict]) -> None:
    """These rows instead of those for the same chip, kernel, pass and shape."""
    merged = {tuple(row[key] for key in KEYS): row for row in [*table(), *rows]}
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    FILE.write_text(f"[\n{lines}\n]\n")
    table.cache_clear()
