"""What a plan knows about machines: peaks, memory, links; and how a topology is named.

    v5p:4x4x4   64 TPU chips in a torus        h100:8x16   16 machines of 8 GPUs

Data-sheet values of November 2026: dense bf16 peak, memory, and bytes a second that one link carries in one direction.
"""

import math
import re
from dataclasses import dataclass

from opensora_jax.common.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; `cores` of them are one chip of the data sheet."""

    name: str
    flops: float  # bf16, per second
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes per second
    link: float  # TPU: one link of the torus, one direction; GPU: NVLink of one GPU, one direction
    clock: float = 0.0  # of the TPU core, in which the compiler counts cycles
    dimensions: int = 0  # of the torus; 0: a GPU
    wraps_at: int = 4  # a side of the torus closes into a ring at multiples of this
    cores: int = 1
    offloads: bool = False  # sparse cores exchange beside computation (parallel/overlap.py)
    network: float = 0.0  # GPU: bytes per second between machines

    @property
    def is_tpu(self) -> bool:
        return self.dimensions > 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 137.5e12, 16e9, 614e9, 45e9, 1.05e9, 3, cores=2),
        Chip("v5e", 197e12, 16e9, 819e9, 45e9, 1.5e9, 2, wraps_at=16),
        Chip("v5p", 459e12, 95e9, 2765e9, 90e9, 1.75e9, 3, offloads=True),
        Chip("v6e", 918e12, 32e9, 1640e9, 90e9, 1.75e9, 2, wraps_at=16, offloads=True),
        Chip("tpu7x", 1153e12, 96e9, 3700e9, 90e9, 2.2e9, 3, cores=2, offloads=True),
        Chip("a100", 312e12, 80e9, 2039e9, 300e9, network=25e9),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, network=50e9),
        Chip("h800", 989e12, 80e9, 3350e9, 200e9, network=50e9),
        Chip("h200", 989e12, 141e9, 4800e9, 450e9, network=50e9),
        Chip("b200", 2250e12, 180e9, 7700e9, 900e9, network=50e9),
    )
}
SYNONYMS = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x", "v7": "tpu7x", "tpu7": "tpu7x"}
EXAMPLES = "v5p:4x4x4, v6e:8x8, h100:8x16"


@dataclass(frozen=True)
class Topology:
    chip: Chip
    sides: tuple[int, ...]  # of the torus; GPUs a machine, machines

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.cores


def parse(text: str) -> Topology:
    """ "v5p:4x4x4" and the like; a mistake is one sentence."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        raise UserError(f"--topology={text} is not CHIP:AxB[xC]; for example {EXAMPLES}")
    name = SYNONYMS.get(match[1], match[1])
    if name not in CHIPS:
        raise UserError(f"--topology={text}: no chip is called {match[1]}; choose one of {', '.join(CHIPS)}")
    chip, sides = CHIPS[name], tuple(map(int, match[2].split("x")))
    if min(sides) < 1:
        raise UserError(f"--topology={text}: every side must be at least 1")
    wanted = chip.dimensions or 2
    if not chip.is_tpu and len(sides) == 1:
        sides = (*sides, 1)
    if len(sides) != wanted:
        form = {2: "two sides, as 8x8", 3: "three sides, as 4x4x4"}[wanted]
        what = form if chip.is_tpu else "GPUs a machine x machines, as 8x16"
        raise UserError(f"--topology={text}: {name} takes {what}")
    return Topology(chip, sides)
