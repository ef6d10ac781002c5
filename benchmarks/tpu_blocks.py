"""Block sizes of our TPU kernels without a TPU: compile alternatives ahead of time, keep the shortest static schedule.

    pip install libtpu                                  # into an environment of its own; extra "aot"
    python -m benchmarks.tpu_blocks --chips v6e         # a table; --kernels cross_attention: of one kernel
    python -m benchmarks.tpu_blocks --write             # v5e, v5p and v6e, into opensora_jax/kernels/blocks.json

Every figure is an ESTIMATE: bundles x trips / clock, as in tpu_schedule.py, or the time in which the kernel's blocks come
from memory, if that is longer. The sizes of the chip "any" stay where none is more than 2% better. Temporal tiles and those of
the modulated products follow the machine's and are not tried.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tpu_schedule import CHIPS
from opensora_jax.plan import chips
from opensora_jax.plan.bundles import of_kernel
from opensora_jax.plan.libtpu import QUIET, dump_to

GAIN = 0.02  # schedules are no better than that
QUERIES = ((256,), (512,), (1024,))
LONGER = ((256,), (544,), (800,))  # of a row that is no straight line
FLASH = ((256, 8192), (512, 4096), (512, 8192), (1024, 4096))
FLASH_BACKWARD = ((512, 1024), (1024, 1024), (1024, 2048), (2048, 1024))


@dataclass(frozen=True)
class Subject:
    """A pass of a kernel over the shape of one case."""

    kernel: str
    stage: str
    case: str
    tried: tuple[tuple[int, ...], ...]

    @property
    def dumped(self) -> str:
        """The kernel's name in the compiler's dump."""
        return (
            {"cross_attention": "cross_backward"}.get(self.kernel, f"{self.kernel}_backward")
            if self.backward
            else self.kernel
        )

    @property
    def backward(self) -> bool:
        return self.stage == "backward"


SUBJECTS = [
    Subject(kernel, stage, case, tried)
    for kernel, case, forward, backward in (
        ("flash_tpu", "v1.0 spatial 1080p", FLASH, FLASH_BACKWARD),
        ("flash_tpu", "v2.0 joint 256px", FLASH, FLASH_BACKWARD),
        ("cross_attention", "v1.0 cross 64x512 text 120", QUERIES, QUERIES),
        ("cross_attention", "v1.2 cross 480p text 300", QUERIES, QUERIES),
        ("stdit_spatial", "v1.0 spatial 64x512", QUERIES, QUERIES),
        ("stdit_spatial", "v1.2 spatial 480p", QUERIES, LONGER),
    )
    for stage, tried in (("forward", forward), ("backward", backward))
]


def compile_one(subject: Subject, sizes: tuple[int, ...], chip: str, folder: Path) -> float:
    """Milliseconds by the schedule that lands in `folder`."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from benchmarks.attention import real_cases
    from opensora_jax import work
    from opensora_jax.kernels import blocks, spec
    from opensora_jax.kernels.attention import attention
    from opensora_jax.kernels.stdit import stdit_attention

    case = next(case for case in real_cases() if case.name == subject.case)
    options = {"num_heads": case.heads, "mode": case.kind} if case.fused else {}
    run = functools.partial(stdit_attention if case.fused else attention, implementation="pallas_tpu", **options)
    array = lambda *dims: jax.ShapeDtypeStruct(dims, "bfloat16")
    if case.fused:
        operands = [array(case.batch, case.queries, case.keys, 3 * case.heads * case.head_dim)]
    else:
        lengths = (case.queries, case.keys, case.keys)
        operands = [array(case.batch, length, case.heads, case.head_dim) for length in lengths]
    if subject.backward:
        operands.append(jax.eval_shape(run, *operands))
        program = lambda *given: jax.vjp(run, *given[:-1])[1](given[-1])
    else:
        program = run
    (device,) = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[:1]
    with spec.target(chip), blocks.trying(subject.kernel, **{subject.stage: sizes}):
        traced = jax.jit(program, in_shardings=SingleDeviceSharding(device)).trace(*operands)
        traced.lower(lowering_platforms=("tpu",)).compile()
    schedule = of_kernel(folder, subject.dumped)
    steps = work.count(traced.jaxpr).steps_a_row().get(subject.dumped, 1)
    return max(schedule.cycles(steps) / chips.CHIPS[chip].clock, _streamed(subject, case, sizes, chip)) * 1e3


def _streamed(subject: Subject, case, sizes, chip: str) -> float:
    """Seconds in which flash attention's moving blocks come from memory: two arrays of heads of 128 lanes."""
    if subject.kernel != "flash_tpu":
        return 0.0
    stays = case.queries / sizes[0] if not subject.backward else case.keys / sizes[1]
    moves = case.keys if not subject.backward else case.queries
    return case.batch * case.heads * stays * moves * 2 * 128 * 2 / chips.CHIPS[chip].bandwidth


def tune(chip: str, kernels: list[str] | None) -> None:
    """In a process of its own, which libtpu loads into once: one JSON line for every subject."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(QUIET | {"TPU_LOG_DIR": name, "LIBTPU_INIT_ARGS": dump_to(name), "XLA_FLAGS": ""})
        for subject in SUBJECTS:
            if kernels and subject.kernel not in kernels:
                continue
            found = {}
            for sizes in subject.tried:
                try:
                    found[sizes] = compile_one(subject, sizes, chip, folder)
                except Exception as error:  # does not fit, or is refused: not an alternative
                    print(f"{subject} {sizes}: {str(error).splitlines()[0][:160]}", file=sys.stderr)
                for file in filter(Path.is_file, folder.iterdir()):
                    file.unlink()
            print(json.dumps({"at": SUBJECTS.index(subject), "ms": [[*pair] for pair in found.items()]}), flush=True)


def rows(subject: Subject, chip: str, found: dict[tuple[int, ...], float]) -> list[dict]:
    """For the table."""
    from benchmarks.attention import real_cases
    from opensora_jax.kernels import blocks

    case = next(case for case in real_cases() if case.name == subject.case)
    usual = blocks.usual(subject.kernel, subject.stage, case.head_dim, case.row)
    best = min(found, key=found.__getitem__)
    if usual in found and found[best] > (1 - GAIN) * found[usual]:
        best = usual
    shape = {"head_dim": case.head_dim, "length": case.row}
    return [{"chip": chip, "kernel": subject.kernel, "pass": subject.stage, **shape, "blocks": list(best)}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--kernels", nargs="+", choices=sorted({s.kernel for s in SUBJECTS}), help="only these")
    parser.add_argument("--write", action="store_true", help="the best go into opensora_jax/kernels/blocks.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        tune(arguments.chips[0], arguments.kernels)
        return 0
    from opensora_jax.kernels import blocks

    print("| kernel, pass | case | chip | ms by sizes (ESTIMATE) |\n|---|---|---|---|")
    for chip in arguments.chips:
        command = [sys.executable, "-m", "benchmarks.tpu_blocks", "--here", "--chips", chip]
        command += ["--kernels", *arguments.kernels] if arguments.kernels else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                record = json.loads(line)
                subject = SUBJECTS[record["at"]]
                found = {tuple(sizes): ms for sizes, ms in record["ms"]}
                cells = ", ".join(f"{'x'.join(map(str, sizes))} {ms:.3f}" for sizes, ms in found.items())
                print(f"| {subject.kernel} {subject.stage} | {subject.case} | {chip} | {cells} |", flush=True)
                if arguments.write and found:
                    blocks.write(rows(subject, chip, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
