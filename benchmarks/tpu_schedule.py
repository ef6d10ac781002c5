"""Time of our TPU kernels without a TPU: compile ahead of time, read the compiler's own schedule.

    pip install libtpu                       # into an environment of its own; extra "aot"
    python -m benchmarks.tpu_schedule --chips v5e v6e --cases "v1.0"
    python -m benchmarks.tpu_schedule --all  # every STDiT shape, v5e, v5p and v6e; minutes a kernel
    python -m benchmarks.tpu_schedule --stock  # against the library's attention (tpu_stock.py)

Every figure is an ESTIMATE: instruction bundles of the static schedule x trip counts / clock, never less than bytes over
bandwidth. It sees no stalls on memory; published measurements of other kernels were 0.75 to 0.8 of such estimates.
One process a compilation, serialised: libtpu holds a lock, and its dump folder is fixed when it loads.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import tpu_stock
from opensora_jax.plan import chips, hlo
from opensora_jax.plan.bundles import of_kernel
from opensora_jax.plan.libtpu import QUIET, dump_to

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}  # the topology of one
REPRESENTATIVE = (
    "v1.0 spatial 16x256",
    "v1.0 spatial 64x512",
    "v1.2 spatial 360p",
    "v1.0 temporal T=16",
    "v1.0 temporal T=32",
    "v1.0 temporal T=64",
    "v1.1 temporal T=16 360p",
    "v1.2 temporal T=30 480p",
)


def compile_case(name: str, chip: str, backward: bool) -> None:
    """In a process of its own: compiles one case for one chip, forward between its two projections; the schedule lands in
    the dump folder."""
    import functools
    from dataclasses import replace

    import jax
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    from benchmarks.attention import real_cases
    from opensora_jax import work
    from opensora_jax.kernels import spec
    from opensora_jax.kernels.stdit import stdit_attention

    case = next(case for case in real_cases() if case.name == name)
    extras = replace(case, **{"queries" if case.kind == "spatial" else "keys": 1}).inputs()[1]
    width = case.heads * case.head_dim
    array = lambda *dims: jax.ShapeDtypeStruct(dims, "bfloat16")
    tokens = (case.batch, case.queries, case.keys)
    attend = functools.partial(stdit_attention, implementation="pallas_tpu", **extras)
    if backward:
        run, shapes = lambda x: jax.vjp(attend, x)[1](x[..., :width]), [array(*tokens, 3 * width)]
    else:
        run = lambda x, qkv, out: attend(x @ qkv) @ out
        shapes = [array(*tokens, width), array(width, 3 * width), array(width, width)]
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    # Row by row, as in a network: left alone, a program takes and returns some shapes in layouts that kernels do not.
    place = lambda x: Format(Layout(tuple(range(x.ndim))), SingleDeviceSharding(device))
    with spec.target(chip):
        outputs = jax.tree.map(place, jax.eval_shape(run, *shapes))
        traced = jax.jit(run, in_shardings=tuple(map(place, shapes)), out_shardings=outputs).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    print(json.dumps({"relayouts": relayouts(text), "steps_a_row": work.count(traced.jaxpr).steps_a_row()}))


def relayouts(text: str) -> list[str]:
    """Pads, copies and transposes above 1 MB in a compiled program, inside fusions too. Prefetches of weights into fast
    memory (copy-start) change no layout."""
    ops = (op for op, _, _ in hlo.parse(text).walk() if op.opcode in ("pad", "copy", "transpose"))
    return [f"{op.opcode} {op.type}" for op in ops if sum(size for _, size in hlo.arrays(op.type)) > 1 << 20]


def estimate(case, chip: str, backward: bool) -> dict:
    """Milliseconds of the kernel and of its memory floor on one chip."""
    with tempfile.TemporaryDirectory() as folder:
        # No flags for CPUs, such as the tests': libtpu stops at those that it does not know.
        quiet = QUIET | {"TPU_LOG_DIR": folder, "LIBTPU_INIT_ARGS": dump_to(folder), "XLA_FLAGS": ""}
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--compile", case.name, "--chips", chip]
        command += ["--backward"] * backward
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            return {"refused": done.stderr.strip().splitlines()[-1][:200]}
        kernel = f"stdit_{case.kind}" + "_backward" * backward
        schedule, said = of_kernel(Path(folder), kernel), json.loads(done.stdout.splitlines()[-1])
    clock, bandwidth = chips.CHIPS[chip].clock, chips.CHIPS[chip].bandwidth
    # Of C channels; spatial gradients read the result.
    arrays = (8 if case.kind == "spatial" else 7) if backward else 4
    floor = case.bytes() * arrays / 4 / bandwidth * 1e3
    steps = said["steps_a_row"].get(kernel, 1)
    return {
        "kernel_ms": max(schedule.cycles(steps) / clock * 1e3, floor),
        "floor_ms": floor,
        "spills_of_slots": schedule.spills_of_slots(steps),
        "spills_of_stores": schedule.spills_of_stores(steps),
        "relayouts": said["relayouts"],
    }


def report(arguments) -> int:
    """The estimate that benchmarks.attention shows on a machine without an accelerator."""
    if importlib.util.find_spec("libtpu") is None:
        print("no accelerator here, and no libtpu for the TPU estimate: pip install libtpu, then run this again")
        return 0
    from benchmarks.attention import real_cases

    wanted = getattr(arguments, "chips", None) or ["v6e", "v5e"]
    everything = getattr(arguments, "all", False)
    records = []
    print(
        "| case | pass | chip | kernel ms (ESTIMATE) | memory floor ms | ratio | spills of store slots | of stores | "
        "pads, copies, transposes above 1 MB |"
    )
    print("|" + "---|" * 9)
    for case in real_cases():
        if not case.fused or arguments.cases not in case.name or not (everything or case.name in REPRESENTATIVE):
            continue
        for chip in wanted:
            for backward in (False, True) if everything else (False,):
                record = estimate(case, chip, backward)
                stage = "backward" if backward else "forward"
                records.append({"case": case.name, "pass": stage, "chip": chip, "estimate": True} | record)
                cells = [record["refused"]] if "refused" in record else [
                    f"{record['kernel_ms']:.3f}", f"{record['floor_ms']:.3f}",
                    f"{record['kernel_ms'] / record['floor_ms']:.2f}", f"{record['spills_of_slots']:.0%}",
                    f"{record['spills_of_stores']:.0%}", str(len(record["relayouts"])),
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
    parser.add_argument("--stock", action="store_true", help="spatial kernels against jax's splash attention")
    parser.add_argument("--compile", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--compile-stock", metavar="SUBJECT", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_case(arguments.compile, arguments.chips[0], arguments.backward)
        return 0
    if arguments.compile_stock:
        (at, blocks), chip = json.loads(arguments.compile_stock), arguments.chips[0]
        tpu_stock.compile_program(tpu_stock.SUBJECTS[at], blocks, chip, CHIPS[chip], arguments.backward)
        return 0
    if arguments.stock:
        records = tpu_stock.report(arguments.chips or ["v6e", "v5e"])
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(records, indent=1) + "\n")
        return 0
    if arguments.all and not arguments.chips:
        arguments.chips = list(CHIPS)
    return report(arguments)


if __name__ == "__main__":
    sys.exit(main())
