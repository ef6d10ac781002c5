"""The compiler's static schedule of one TPU kernel, from the text that libtpu dumps.

The dump (`LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"`) holds the instruction bundles of every
kernel: bundles x trips / clock is a time that no machine is needed for. It sees no stalls on memory.
"""

import re
from dataclasses import dataclass

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:> ?)*)\{")
EXIT = re.compile(r"scmp\.ge\.s32\.totalorder \S+ (\d+) /\* loop exit test")


@dataclass(frozen=True)
class Schedule:
    """Of one kernel: bundles of a grid step outside inner loops, of an inner loop's body, its trips, and of the first
    conditional region (work done once a row)."""

    step: int
    inner: int
    trips: int
    once: int
    spill_share: float

    def cycles(self, steps: int, steps_per_row: int) -> float:
        """Over the whole grid, if the first conditional region runs once in `steps_per_row` steps."""
        return steps * (self.step + self.inner * self.trips - self.once * (1 - 1 / steps_per_row))


def read_schedule(bundles: str, utilization: str = "") -> Schedule:
    """From the text of *final_bundles.txt and of *final_hlo-static-per-bundle-utilization.txt."""
    depth, trips, first_region, position = {}, {}, None, 0
    for line in bundles.splitlines():
        match = BUNDLE.match(line)
        if not match:
            continue
        position += 1
        level = match.group(2).count(">")
        depth[level] = depth.get(level, 0) + 1
        if match.group(1) == "PF" and first_region is None and level == 1:
            first_region = position
        exit_test = EXIT.search(line)
        if exit_test:
            trips[level] = int(exit_test.group(1))
    rows = [list(map(int, line.split())) for line in utilization.splitlines() if re.fullmatch(r"(\d+ ?){11}", line)]
    spills = sum(row[9] for row in rows) / max(len(rows), 1)
    once = first_region or 0
    return Schedule(depth.get(1, 0), depth.get(2, 0), trips.get(2, 1), once if once > 500 else 0, spills)
