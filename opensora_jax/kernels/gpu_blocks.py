"""Block sizes of the GPU kernels, by chip, kernel, pass and shape: gpu_blocks.json.

`python -m benchmarks.attention --tune --write` times alternatives on the GPU at hand and puts the fastest there, as rows of
that chip. Rows of the chip "any" were never timed: tiles as large as registers seemed to allow, of which only those of
`mosaic_gpu` for heads of 128 were compiled for sm_90a (`python -m benchmarks.gpu_compile`).
"""

import functools
import json
from pathlib import Path

from opensora_jax.kernels import spec

FILE = Path(__file__).with_name("gpu_blocks.json")
KEYS = ("chip", "kernel", "pass", "head_dim", "length")


@functools.cache
def table() -> list[dict]:
    return json.loads(FILE.read_text())


def find(kernel: str, stage: str, head_dim: int, length: int) -> tuple[int, ...]:
    """Of this chip's first row that fits, else of the first that fits for any chip: a row serves heads and keys up to
    its own, and rows are in rising order."""
    for chip in (spec.chip(), "any"):
        for row in table():
            fits = head_dim <= row["head_dim"] and length <= row["length"]
            if fits and (row["chip"], row["kernel"], row["pass"]) == (chip, kernel, stage):
                return tuple(row["blocks"])
    raise KeyError(f"{FILE.name} has no row for {kernel} {stage} with heads of {head_dim} and {length} keys")


def write(rows: list[dict]) -> None:
    """These rows instead of those for the same chip, kernel, pass and shape."""
    merged = {tuple(row[key] for key in KEYS): row for row in [*table(), *rows]}
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    FILE.write_text(f"[\n{lines}\n]\n")
    table.cache_clear()
