"""Attention on this machine: every back end, ours and the libraries', on every real shape (tests/kernels/cases.py).

    python -m benchmarks.attention --check --json a.json --markdown a.md     # GPU: measure, under 8 minutes
    python -m benchmarks.attention --cases "v1.0 temporal" --tune             # block sizes too
    python -m benchmarks.attention                                            # no accelerator: TPU estimate

Each group of cases runs in a process of its own, so that a kernel that crashes or hangs costs its group only. Times are
medians over several batches of asynchronous calls; TFLOP/s counts useful work (2 operations a multiply-add, padding and
hidden keys not counted; backward 2.5 x forward); bandwidth counts q, k, v and output once. `--check` compares results
and gradients with a float32 reference.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.0e12)}  # dense bf16 FLOP/s, bytes/s
GROUPS = ("temporal", "spatial", "cross", "joint")
TUNED = ("v1.0 temporal T=16", "v1.0 temporal T=64", "v1.2 temporal T=30 480p", "DiT image 512px", "v2.0 joint 256px")
TOLERANCE = {"forward": 1e-2, "backward": 2e-2}  # relative to the norm of the reference, bf16 against float32


def real_cases() -> list:
    """tests/kernels/cases.py by its path: another package called tests may be installed."""
    path = Path(__file__).parents[1] / "tests" / "kernels" / "cases.py"
    spec = importlib.util.spec_from_file_location("opensora_jax_attention_cases", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def group(case) -> str:
    if case.fused:
        return case.kind
    return "joint" if case.keys > 512 else "cross"


def candidates(case, *, tune: bool):
    """name → (function of the differentiated arrays, or None when it needs torch)."""
    import functools

    from opensora_jax.kernels import attention, pallas_gpu, stdit, stdit_gpu

    arrays, extras = case.inputs()
    public = stdit.stdit_attention if case.fused else attention.attention
    out = {"auto": functools.partial(public, **extras)}
    for name in ("xla", "cudnn", "pallas_gpu"):
        out[name] = functools.partial(public, implementation=name, **extras)
    if not case.fused and not case.ragged:
        out |= stock(case)
    if not tune:
        return arrays, out
    if case.fused and case.row <= stdit_gpu.MAX_ROW:
        options = {"q_scale": None, "k_scale": None, "rope": None} | extras
        for rows, warps in ((32, 2), (32, 4), (64, 2), (64, 8), (128, 4), (128, 8)):
            if rows >= case.row:
                run = functools.partial(stdit_gpu.stdit_attention, tile_rows=rows, warps=warps, **options)
                out[f"tune rows={rows} warps={warps}"] = run
    elif not case.fused:
        blocks = pallas_gpu.Blocks
        forward = [(128, 128, 8, 2), (128, 64, 8, 4), (128, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 4), (64, 128, 4, 2)]
        backward = [(64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 4, 2), (128, 128, 8, 2), (32, 64, 4, 3)]
        for first, second in zip(forward, backward):
            stages = {"forward": blocks(*first), "dkv": blocks(*second), "dq": blocks(*(second[1::-1] + second[2:]))}
            label = " ".join(f"{stage}={'/'.join(map(str, block))}" for stage, block in stages.items())
            out[f"tune {label}"] = functools.partial(
                pallas_gpu.attention, scale=case.head_dim**-0.5, blocks=tuple(stages.items()), **extras
            )
    return arrays, out


def stock(case):
    """Library kernels that take this shape as it is."""
    from jax.experimental.pallas.ops.gpu import attention as triton_mha

    out = {}
    if case.queries % 128 == 0 and case.keys % 128 == 0 and not case.causal:
        sizes = triton_mha.BlockSizes(128, 64, 64, 64, 64, 64)
        out["stock pallas mha"] = lambda q, k, v: triton_mha.mha(
            q, k, v, None, sm_scale=case.head_dim**-0.5, block_sizes=sizes
        )
    if case.head_dim % 64 == 0 and case.queries % 256 == 0 and not case.causal:
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        config = attention_mgpu.TuningConfig(
            128, 128, 2, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, compute_wgs_bwd=2
        )
        out["stock mosaic gpu"] = lambda q, k, v: attention_mgpu.attention(
            q * jnp_scale(q, case.head_dim), k, v, config
        )
    return out


def jnp_scale(q, head_dim):
    import jax.numpy as jnp

    return jnp.asarray(head_dim**-0.5, q.dtype)


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


def measure(case, *, check: bool, tune: bool, deadline: float):
    """One record per candidate."""
    import jax
    import jax.numpy as jnp

    arrays, runs = candidates(case, tune=tune and case.name in TUNED)
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
    if check:
        wide = tuple(x.astype(jnp.float32) for x in arrays)
        with jax.default_matmul_precision("highest"):
            reference = gradients_of(_reference(case))(cotangent.astype(jnp.float32), *wide)
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


def _reference(case):
    import functools

    from opensora_jax.kernels import attention, stdit

    _, extras = case.inputs()
    public = stdit.stdit_attention if case.fused else attention.attention
    return functools.partial(public, implementation="xla", **extras)


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
            records = measure(case, check=arguments.check, tune=arguments.tune, deadline=deadline)
            for source in (records, torch_records(case) if arguments.torch else ()):
                for record in source:
                    sink.write(json.dumps(record | {"group": arguments.group}) + "\n")
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


def markdown(records, peak) -> str:
    lines = [
        "| case | back end | fwd ms | TFLOP/s | of peak | GB/s | of peak | bwd ms | TFLOP/s | error | grad error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if "refused" in record:
            lines.append(f"| {record['case']} | {record['candidate']} | {record['refused'][:90]} |" + " |" * 8)
            continue
        flops, band = record["forward_tflops"] * 1e12 / peak[0], record["forward_gbs"] * 1e9 / peak[1]
        back = record["backward_tflops"]
        cells = [record["case"], record["candidate"], f"{record['forward_ms']:.3f}", f"{record['forward_tflops']:.0f}"]
        cells += [f"{flops:.0%}", f"{record['forward_gbs']:.0f}", f"{band:.0%}", f"{record['backward_ms']:.3f}"]
        cells += [f"{back:.0f}" if back else "-"]
        cells += [f"{record[key]:.1e}" if key in record else "-" for key in ("error", "gradient_error")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--check", action="store_true", help="compare with a float32 reference")
    parser.add_argument("--tune", action="store_true", help="on some cases, time other block sizes of our kernels too")
    parser.add_argument("--torch", action="store_true", help="time torch's attention too")
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
    records = run_all(arguments)
    peak = next((rate for name, rate in PEAKS.items() if name in device.device_kind), PEAKS["H100"])
    table = markdown(records, peak)
    summary = {"device": device.device_kind, "jax": jax.__version__, "peak": peak, "records": records}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(summary, indent=1) + "\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text(table)
    print(table)
    wrong = [f"{record['case']} / {record['candidate']}" for record in records if record.get("correct") is False]
    if wrong:
        print("outside the tolerance: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
