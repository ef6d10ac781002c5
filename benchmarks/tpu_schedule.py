"""Time of our TPU kernels without a TPU: compile ahead of time, read the compiler's own schedule.

    pip install libtpu                       # into an environment of its own; extra "aot"
    python -m benchmarks.tpu_schedule --chips v5e v6e --cases "v1.0"
    python -m benchmarks.tpu_schedule --all  # every STDiT shape, v5e, v5p and v6e; minutes a kernel

Every figure is an ESTIMATE: instruction bundles of the static schedule x trip counts / clock, never less than bytes over
bandwidth. It sees no stalls on memory; published measurements of other kernels were 0.75 to 0.8 of such estimates.
One process a compilation, serialised: libtpu holds a lock, and its dump folder is fixed when it loads.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHIPS = {  # topology, clock, bytes per second
    "v5e": ("v5e:1x1", 1.5e9, 819e9),
    "v5p": ("v5p:1x1x1", 1.75e9, 2765e9),
    "v6e": ("v6e:1x1", 1.75e9, 1640e9),
}
REPRESENTATIVE = (
    "v1.0 spatial 64x512",
    "v1.2 spatial 360p",
    "v1.0 temporal T=16",
    "v1.0 temporal T=32",
    "v1.0 temporal T=64",
    "v1.2 temporal T=30 480p",
)
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


def compile_case(name: str, chip: str, backward: bool) -> None:
    """In a process of its own: compiles one case for one chip; the schedule lands in the dump folder."""
    import functools
    from dataclasses import replace

    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from benchmarks.attention import real_cases
    from opensora_jax.kernels import spec
    from opensora_jax.kernels.stdit import stdit_attention

    case = next(case for case in real_cases() if case.name == name)
    extras = replace(case, **{"queries" if case.kind == "spatial" else "keys": 1}).inputs()[1]
    shape = jax.ShapeDtypeStruct((case.batch, case.queries, case.keys, 3 * case.heads * case.head_dim), "bfloat16")
    run = functools.partial(stdit_attention, implementation="pallas_tpu", **extras)
    if backward:
        forward = run
        run = lambda x: jax.vjp(forward, x)[1](x[..., : x.shape[-1] // 3])
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    place = SingleDeviceSharding(device)
    with spec.target(chip):
        traced = jax.jit(run, in_shardings=place, out_shardings=place).trace(shape)
        traced.lower(lowering_platforms=("tpu",)).compile()


def estimate(case, chip: str, backward: bool) -> dict:
    """Milliseconds of the kernel and of its memory floor on one chip."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        quiet["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--compile", case.name, "--chips", chip]
        command += ["--backward"] * backward
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            return {"refused": done.stderr.strip().splitlines()[-1][:200]}
        files = {path.name.split("-")[-1]: path for path in sorted(Path(folder).glob(f"*stdit_{case.kind}*final*"))}
        bundles = next(
            p for p in Path(folder).glob(f"*stdit_{case.kind}*-final_bundles.txt") if "analysis" not in p.name
        )
        utilization = files.get("utilization.txt")
        schedule = read_schedule(bundles.read_text(), utilization.read_text() if utilization else "")
    _, clock, bandwidth = CHIPS[chip]
    steps, per_row = grid(case, backward)
    floor = case.bytes() * (7 / 4 if backward else 1) / bandwidth * 1e3
    kernel = schedule.cycles(steps, per_row) / clock * 1e3
    return {"kernel_ms": max(kernel, floor), "floor_ms": floor, "spill_share": schedule.spill_share}


def grid(case, backward: bool) -> tuple[int, int]:
    """(grid steps, steps that share one row's preparation)."""
    from opensora_jax.kernels import stdit_tpu

    if case.kind == "temporal":
        block = 16 if case.queries <= 64 else 8
        return case.batch * -(-case.keys // block), 1
    rows = case.batch * case.queries
    blocks = 1 if backward else -(-case.keys // stdit_tpu.even_blocks(case.keys, stdit_tpu.QUERY_BLOCK["forward"]))
    return rows * blocks, blocks


def report(arguments) -> int:
    """The estimate that benchmarks.attention shows on a machine without an accelerator."""
    if importlib.util.find_spec("libtpu") is None:
        print("no accelerator here, and no libtpu for the TPU estimate: pip install libtpu, then run this again")
        return 0
    from benchmarks.attention import real_cases

    chips = getattr(arguments, "chips", None) or ["v6e", "v5e"]
    everything = getattr(arguments, "all", False)
    records = []
    print("| case | pass | chip | kernel ms (ESTIMATE) | memory floor ms | ratio | spills of store slots |")
    print("|---|---|---|---|---|---|---|")
    for case in real_cases():
        if not case.fused or arguments.cases not in case.name or not (everything or case.name in REPRESENTATIVE):
            continue
        for chip in chips:
            for backward in (False, True) if everything else (False,):
                record = estimate(case, chip, backward)
                stage = "backward" if backward else "forward"
                records.append({"case": case.name, "pass": stage, "chip": chip, "estimate": True} | record)
                cells = [record["refused"]] if "refused" in record else [
                    f"{record['kernel_ms']:.3f}", f"{record['floor_ms']:.3f}",
                    f"{record['kernel_ms'] / record['floor_ms']:.2f}", f"{record['spill_share']:.0%}",
                ]  # fmt: skip
                print("| " + " | ".join([case.name, stage, chip, *cells]) + " |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=None)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="every STDiT case, forward and backward")
    parser.add_argument("--json", help="write the records here")
    parser.add_argument("--compile", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_case(arguments.compile, arguments.chips[0], arguments.backward)
        return 0
    if arguments.all and not arguments.chips:
        arguments.chips = list(CHIPS)
    return report(arguments)


if __name__ == "__main__":
    sys.exit(main())
