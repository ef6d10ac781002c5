"""The compiler's static schedule of one TPU kernel, from the text that libtpu dumps.

The dump (`LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"`) holds the instruction bundles of every
kernel: bundles x trips / clock is a time that no machine is needed for. It sees no stalls on memory, and counts what
stands behind a condition as if it always ran, except in kernels that begin or end rows there.
"""

import functools
import glob
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:> ?)*)\{")
EXIT = re.compile(r"scmp\.ge\.s32\.totalorder \S+ (\d+) /\* loop exit test")
STORES, SPILLS = 8, 9  # columns of the utilization table
BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
END = re.compile(r"empty region (\d+)")
OVERLAP = 2  # the grid's loop runs this much longer: it fills and drains the pipeline


class Counts(NamedTuple):
    bundles: float = 0
    stores: float = 0
    spills: float = 0  # stores of registers that were too few


@dataclass(frozen=True)
class Schedule:
    """Of one kernel: steps of the grid, what one step takes, inner loops times their trips, and of that what stands behind
    conditions; a bundle's slots for stores."""

    steps: int
    step: Counts
    once: Counts
    slots: int

    def of_a_step(self, steps_per_row: int = 1) -> Counts:
        """If what stands behind conditions runs once in `steps_per_row` steps."""
        return Counts(*(x - y * (1 - 1 / steps_per_row) for x, y in zip(self.step, self.once)))

    def cycles(self, steps_per_row: int = 1) -> float:
        """Over the whole grid."""
        return self.steps * self.of_a_step(steps_per_row).bundles

    def spills_of_slots(self, steps_per_row: int = 1) -> float:
        """The share of the machine's store slots that spilled registers take."""
        step = self.of_a_step(steps_per_row)
        return step.spills / (step.bundles * self.slots)

    def spills_of_stores(self, steps_per_row: int = 1) -> float:
        step = self.of_a_step(steps_per_row)
        return step.spills / max(step.stores, 1)


@dataclass
class Loop:
    """A loop of the schedule; its own bundles, without those of loops inside."""

    around: "Loop | None"
    own: Counts = field(default_factory=Counts)
    trips: int = 1

    @property
    def times(self) -> int:
        """Per step of the outermost loop, the grid."""
        return self.trips * self.around.times if self.around else 1

    @property
    def total(self) -> Counts:
        return Counts(*(x * self.times for x in self.own))


@dataclass
class Region:
    """Of the grid's loop, what a branch skips: its own bundles, and the loops in it."""

    inside: bool  # of another one; the outermost are the pipeline's own
    own: Counts = field(default_factory=Counts)
    loops: list[Loop] = field(default_factory=list)
    branches: bool = False  # are there others in it?

    @property
    def total(self) -> Counts:
        return _total([self.own, *(loop.total for loop in self.loops)])


def read_schedule(bundles: str, utilization: str = "") -> Schedule:
    """From the text of *final_bundles.txt and of *final_hlo-static-per-bundle-utilization.txt."""
    cells = [line.split() for line in utilization.splitlines()]
    table = [list(map(int, row)) for row in cells if len(row) == 11 and "".join(row).isdigit()]
    slots, rows = (table[0][STORES], table[1:]) if table else (1, [])
    loops, open_loops, position = [], [], 0
    regions, once = {}, Counts()
    for line in bundles.splitlines():
        match = BUNDLE.match(line)
        if not match:
            continue
        position += 1
        level = match.group(2).count(">")
        used = Counts(1, *(rows[position - 1][i] for i in (STORES, SPILLS))) if position <= len(rows) else Counts(1)
        if match.group(1) == "LB" and level:
            loops.append(Loop(open_loops[level - 2] if level > 1 else None))
            open_loops[level - 1 :] = [loops[-1]]
            for region in regions.values():
                region.loops.append(loops[-1])
        for end in END.findall(line):
            region = regions.pop(end, None)
            if region and region.inside and not region.branches:
                once = _total([once, region.total])
        if not 0 < level <= len(open_loops):
            continue
        if level == 1:
            for region in regions.values():
                region.own = _total([region.own, used])
            for target in BRANCH.findall(line):
                for region in regions.values():
                    region.branches = True
                regions[target] = Region(inside=bool(regions))
        open_loops[level - 1].own = _total([open_loops[level - 1].own, used])
        exit_test = EXIT.search(line)
        if exit_test:
            open_loops[level - 1].trips = int(exit_test.group(1))
    step = _total([loop.total for loop in loops])
    return Schedule(max(1, math.prod(loop.trips for loop in loops[:1]) - OVERLAP), step, once, slots)


def _total(parts: list[Counts]) -> Counts:
    return functools.reduce(lambda a, b: Counts(*(x + y for x, y in zip(a, b))), parts, Counts())


def of_kernel(folder: Path, name: str) -> Schedule:
    """The schedule of an instruction, or of the first kernel of this name, from a folder of dumps. Under differentiation
    a kernel's instruction is called transpose_jvp_<name>__."""
    found = _of_kernels(folder, rf"(\w+_)?{re.escape(name)}_*(\.\d+)?")
    if not found:
        raise FileNotFoundError(f"{folder}: no schedule of {name}")
    return found[0]


def _of_kernels(folder: Path, pattern: str) -> list[Schedule]:
    files = sorted(path for path in folder.iterdir() if re.search(rf"-{pattern}-\d+-final_bundles.txt$", path.name))
    utilization = "final_hlo-static-per-bundle-utilization.txt"

    def text(path: Path) -> str:
        kernel = re.sub(r"-\d+-final_bundles.txt$", "", path.name)
        return next(folder.glob(f"{glob.escape(kernel)}-*-{utilization}")).read_text()

    return [read_schedule(path.read_text(), text(path)) for path in files]


def kernel_name(instruction: str) -> str:
    """Of an instruction: what is left without the marks of differentiation and a number."""
    return re.sub(r"\.\d+$", "", instruction).removeprefix("transpose_").removeprefix("jvp_").strip("_")


def call_seconds(
    folder: Path, clock: float, alike: dict[str, list[str]], steps_a_row: dict[str, int]
) -> Callable[[str], float]:
    """Of one call of the kernel that an instruction is. Calls that are alike (hlo.py) are compiled once, under the name of
    one of them: where none has a schedule, the longest of its kind stands for it. steps_a_row: by name, of kernels that do
    something in the first of these steps alone."""

    @functools.cache
    def seconds(name: str) -> float:
        kind = re.sub(r"\.\d+$", "", name)
        same = "|".join(map(re.escape, alike.get(name, [])))
        patterns = (re.escape(name), rf"({same})", rf"{re.escape(kind)}(\.\d+)?")
        found = next(filter(None, (_of_kernels(folder, pattern) for pattern in patterns)), None)
        if not found:
            raise FileNotFoundError(f"{folder}: no schedule of {name}")
        return max(schedule.cycles(steps_a_row.get(kernel_name(name), 1)) for schedule in found) / clock

    return seconds
