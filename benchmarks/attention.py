"""Attention on this machine: every back end, ours and the libraries', on every real shape (tests/kernels/cases.py).

    python -m benchmarks.attention --check --tune --torch --prove --json a.json --markdown a.md   # GPU, under 8 minutes
    python -m benchmarks.attention --prove                # TPU or GPU: is the automatic choice the fastest? (exit status)
    python -m benchmarks.attention --tune --write         # put the fastest blocks into kernels/blocks.json
    python -m benchmarks.attention                        # no accelerator: estimate for TPUs

Each group of cases runs in a process of its own, so that a kernel that crashes or hangs costs its group only. Times are
medians over several batches of asynchronous calls; TFLOP/s counts useful work (2 operations a multiply-add, padding and
hidden keys not counted; backward 2.5 x forward); bandwidth counts q, k, v and output once. `--check` compares results
and gradients with a float32 reference. `--prove` fails where another back end is more than 5% faster than the chosen one,
forward or forward and backward.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.attention_runs import OURS, TUNED, alternatives, candidates, real_cases

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SLACK = 1.05  # times of the chosen back end that count as equal to the fastest
GROUPS = ("temporal", "spatial", "cross", "joint")
TOLERANCE = {"forward": 1e-2, "backward": 2e-2}  # relative to the norm of the reference, bf16 against float32


def group(case) -> str:
    if case.fused:
        return case.kind
    return "joint" if case.keys > 512 else "cross"


def timed(run, repeats: float = 0.12) -> float:
    """Seconds a call: median over batches of asynchronous calls that together fill `repeats` seconds."""
    import jax
    import numpy as np

    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready([run() for _ in range(2)])
    once = (time.perf_counter() - start) / 2
    calls = max(1, min(20, int(repeats / 5 / max(once, 1e-6))))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        samples.append((time.perf_counter() - start) / calls)
    return float(np.median(samples))


def relative_error(ours, reference) -> float:
    import jax.numpy as jnp

    ours, reference = ours.astype(jnp.float32), reference.astype(jnp.float32)
    error = jnp.linalg.norm((ours - reference).ravel()) / jnp.maximum(jnp.linalg.norm(reference.ravel()), 1e-30)
    return float(error)


def gradients_of(run):
    """(output, gradients) with a fixed random cotangent."""
    import jax

    def both(cotangent, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(cotangent)

    return jax.jit(both)


def measure(case, arrays, runs, exact, deadline: float):
    """One record per run. exact: what results are compared with, or None."""
    import jax
    import jax.numpy as jnp

    shape = jax.eval_shape(next(iter(runs.values())), *arrays)
    cotangent = jax.random.normal(jax.random.key(7), shape.shape).astype(shape.dtype)
    programs = {name: (jax.jit(run), gradients_of(run)) for name, run in runs.items()}

    def compiled(name):
        forward, both = programs[name]
        try:
            return forward.lower(*arrays).compile(), both.lower(cotangent, *arrays).compile()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else repr(error)

    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        ready = dict(zip(programs, pool.map(compiled, programs)))
    reference = None
    if exact:
        wide = tuple(x.astype(jnp.float32) for x in arrays)
        with jax.default_matmul_precision("highest"):
            reference = gradients_of(exact)(cotangent.astype(jnp.float32), *wide)
    for name, programs_or_reason in ready.items():
        record = {"case": case.name, "candidate": name}
        if isinstance(programs_or_reason, str):
            yield record | {"refused": programs_or_reason}
        elif time.time() > deadline:
            yield record | {"refused": "out of time"}
        else:
            try:
                yield record | figures(case, programs_or_reason, arrays, cotangent, reference)
            except Exception as error:
                yield record | {"refused": f"{type(error).__name__}: {str(error)[:200]}"}


def figures(case, programs, arrays, cotangent, reference):
    forward, both = programs
    out = {}
    if reference is not None:
        ours = both(cotangent, *arrays)
        errors = [relative_error(a, b) for a, b in zip(ours[1], reference[1])]
        out["error"], out["gradient_error"] = relative_error(ours[0], reference[0]), max(errors)
        out["correct"] = out["error"] < TOLERANCE["forward"] and out["gradient_error"] < TOLERANCE["backward"]
        del ours
    seconds = timed(lambda: forward(*arrays))
    backward = timed(lambda: both(cotangent, *arrays)) - seconds
    return out | rates(case, seconds, backward)


def rates(case, seconds, backward):
    flops, moved = float(case.flops()), float(case.bytes())
    return {
        "forward_ms": seconds * 1e3,
        "backward_ms": backward * 1e3,
        "forward_tflops": flops / seconds / 1e12,
        "backward_tflops": 2.5 * flops / backward / 1e12 if backward > 0 else None,
        "forward_gbs": moved / seconds / 1e9,
    }


def torch_records(case):
    """torch's own choice and its flash and cuDNN back ends on the same problem, where torch and a GPU are there."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return
    if not torch.cuda.is_available() or case.ragged or case.window:
        return
    rows, length = (case.batch, case.queries) if not case.fused else (case.tokens // case.row, case.row)
    keys = case.keys if not case.fused else length
    new = lambda n: torch.randn(
        rows, n, case.heads, case.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    q, k, v = new(length), new(keys), new(keys)
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=case.causal
    )

    def clock(run):
        for _ in range(2):
            run()
        samples = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(5):
                run()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 5e3)
        return sorted(samples)[2]

    for name, backend in (("torch flash", SDPBackend.FLASH_ATTENTION), ("torch cudnn", SDPBackend.CUDNN_ATTENTION)):
        record = {"case": case.name, "candidate": name}
        try:
            with sdpa_kernel(backend):
                with torch.no_grad():
                    seconds = clock(attend)
                cotangent = torch.randn_like(attend())
                total = clock(lambda c=cotangent: attend().backward(c))
            yield record | rates(case, seconds, total - seconds)
        except RuntimeError as error:
            yield record | {"refused": str(error).splitlines()[0][:200]}
    torch.cuda.empty_cache()


def run_group(arguments):
    """In a process of its own: one JSON line a record."""
    deadline = time.time() + arguments.group_seconds * 0.85
    with open(arguments.records, "a") as sink:
        for case in real_cases():
            if group(case) != arguments.group or arguments.cases not in case.name:
                continue
            arrays, extras = case.inputs()
            runs = candidates(case, extras)
            records = measure(case, arrays, runs, runs["xla"] if arguments.check else None, deadline)
            for source in (records, torch_records(case) if arguments.torch else ()):
                keep(sink, source, group=arguments.group)
        for case in real_cases() if arguments.tune else ():  # last: what matters less when time runs out
            if group(case) != arguments.group or arguments.cases not in case.name or case.name not in TUNED:
                continue
            arrays, extras = case.inputs()
            runs, blocks = alternatives(case, extras)
            exact = candidates(case, extras)["xla"] if arguments.check else None
            for record in measure(case, arrays, runs, exact, deadline):
                keep(sink, [record], group=arguments.group, blocks=blocks[record["candidate"]])


def keep(sink, records, **more):
    for record in records:
        sink.write(json.dumps(record | more) + "\n")
        sink.flush()


def run_all(arguments) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        records.touch()
        for name in GROUPS:
            command = [sys.executable, "-m", "benchmarks.attention", "--group", name, "--records", str(records)]
            command += ["--cases", arguments.cases, "--group-seconds", str(arguments.group_seconds)]
            command += [flag for flag in ("--check", "--tune", "--torch") if getattr(arguments, flag[2:])]
            begin = time.time()
            try:
                done = subprocess.run(command, timeout=arguments.group_seconds, capture_output=True, text=True)
                outcome = "done" if done.returncode == 0 else f"failed: {done.stderr[-1500:]}"
            except subprocess.TimeoutExpired:
                outcome = "stopped at its time limit"
            print(f"{name}: {outcome} ({time.time() - begin:.0f} s)", file=sys.stderr, flush=True)
        return [json.loads(line) for line in records.read_text().splitlines()]


TIMES = ("forward_ms", "backward_ms")


def compare(records, peak) -> None:
    """Adds to each record its share of the peaks and its time over the fastest that a call can be pinned to."""
    pinnable = {name for names in OURS.values() for name in names}
    timed = [record for record in records if "refused" not in record]
    for record in timed:
        rivals = [r for r in timed if r["case"] == record["case"] and r["candidate"] in pinnable]
        both = lambda r: sum(r[key] for key in TIMES)
        if rivals:
            record["forward_ratio"] = record["forward_ms"] / min(r["forward_ms"] for r in rivals)
            record["both_ratio"] = both(record) / min(map(both, rivals))
        record["forward_of_peak"] = record["forward_tflops"] * 1e12 / peak.flops
        record["backward_of_peak"] = (record["backward_tflops"] or 0) * 1e12 / peak.flops
        record["forward_of_bandwidth"] = record["forward_gbs"] * 1e9 / peak.bandwidth


def slower_than_need_be(records) -> list[str]:
    """Cases whose automatic choice is not the fastest back end, in words."""
    found = []
    for record in records:
        if record["candidate"] != "auto" or "forward_ratio" not in record:
            continue
        for which, ratio in (("forward", record["forward_ratio"]), ("with backward", record["both_ratio"])):
            if ratio > SLACK:
                found.append(f"{record['case']}: the automatic choice takes {ratio:.2f} of the fastest, {which}")
    missing = {r["case"] for r in records} - {
        r["case"] for r in records if "forward_ratio" in r and r["candidate"] == "auto"
    }
    return found + [f"{case}: not measured" for case in sorted(missing)]


def fastest_blocks(records, chip: str) -> list[dict]:
    """Rows for kernels/blocks.json: by kernel, head size and length the fastest of each pass."""
    best = {}
    sizes = {case.name: (case.head_dim, case.row) for case in real_cases()}
    for record in records:
        if "blocks" not in record or "refused" in record or record.get("correct") is False:
            continue
        stages = dict(record["blocks"])
        kernel = stages.pop("kernel")
        for stage, block in stages.items():
            time_of = record["backward_ms" if stage in ("dkv", "dq") else "forward_ms"]
            key = (kernel, stage, *sizes[record["case"]])
            if key not in best or time_of < best[key][0]:
                best[key] = time_of, block
    keys = ("kernel", "pass", "head_dim", "length")
    return [{"chip": chip} | dict(zip(keys, key)) | {"blocks": block} for key, (_, block) in best.items()]


def markdown(records) -> str:
    lines = [
        "| case | back end | fwd ms | of fastest | TFLOP/s | of peak | GB/s | of peak | bwd ms | TFLOP/s | of peak | error | grad error |",
        "|" + "---|" * 13,
    ]
    for record in records:
        if "refused" in record:
            lines.append(f"| {record['case']} | {record['candidate']} | {record['refused'][:90]} |" + " |" * 10)
            continue
        back = record["backward_tflops"]
        cells = [record["case"], record["candidate"], f"{record['forward_ms']:.3f}"]
        cells += [f"{record['forward_ratio']:.2f}" if "forward_ratio" in record else "-"]
        cells += [f"{record['forward_tflops']:.0f}", f"{record['forward_of_peak']:.0%}"]
        cells += [
            f"{record['forward_gbs']:.0f}",
            f"{record['forward_of_bandwidth']:.0%}",
            f"{record['backward_ms']:.3f}",
        ]
        cells += [f"{back:.0f}" if back else "-", f"{record['backward_of_peak']:.0%}"]
        cells += [f"{record[key]:.1e}" if key in record else "-" for key in ("error", "gradient_error")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--check", action="store_true", help="compare with a float32 reference")
    parser.add_argument("--tune", action="store_true", help="on some cases, time other block sizes of our kernels too")
    parser.add_argument("--torch", action="store_true", help="time torch's attention too")
    parser.add_argument("--prove", action="store_true", help="fail where the automatic choice is not the fastest")
    parser.add_argument("--write", action="store_true", help="with --tune: keep the fastest blocks as this chip's")
    parser.add_argument("--json", help="write the records here")
    parser.add_argument("--markdown", help="write the table here")
    parser.add_argument("--group-seconds", type=float, default=110, help="time limit of one group of cases")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--records", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.group:
        return run_group(arguments)
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        from benchmarks import tpu_schedule

        return tpu_schedule.report(arguments)
    from opensora_jax.kernels import blocks as block_table
    from opensora_jax.kernels import spec
    from opensora_jax.plan.chips import CHIPS

    records = run_all(arguments)
    peak = next((chip for name, chip in CHIPS.items() if name in device.device_kind.lower()), None)
    peak = peak or CHIPS.get(spec.chip(), CHIPS["h100"])
    compare(records, peak)
    table = markdown(records)
    summary = {"device": device.device_kind, "jax": jax.__version__, "peaks_of": peak.name, "records": records}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(summary, indent=1) + "\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text(table)
    print(table)
    if arguments.write:
        block_table.write(fastest_blocks(records, spec.chip()))
    wrong = [f"{r['case']} / {r['candidate']}: outside the tolerance" for r in records if r.get("correct") is False]
    wrong += slower_than_need_be(records) if arguments.prove else []
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
