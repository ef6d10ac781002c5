"""Our spatial kernels for TPUs against jax's own splash attention, by what the compiler says of whole programs.

    python -m benchmarks.tpu_schedule --stock        # v6e and v5e; libtpu, no TPU; 30 minutes of CPU

Both programs project rows of tokens to q, k, v, attend in heads of 72, project back and add the result to the rows, as a
network's layer does, forward, and forward with backward. Ours projects with the kernels that our networks project with
(kernels/modulated.py), the library's with XLA, and has the transposes that its layout needs. A total is what XLA says of all
that is outside kernels (its cycles; copies by their traffic, as plan/hlo.py counts) and the static schedules of the kernels,
never less than their traffic: all ESTIMATES. A second ratio has XLA's cycles for copies too, which are several times their
traffic. The library runs with the best of a few block sizes, chosen by the same totals. Its program is the best that we found
(heads split as our own XLA back end does) and, with the same blocks, as the originals are written: q, k and v split from their
projection by one transpose of five dimensions.

The second subject has q/k norm, rotation, and rows of no whole tiles, which the library's program pads and hides.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_jax.plan import bundles, chips, hlo
from opensora_jax.plan.libtpu import QUIET, dump_to

ROWS, HEADS, HEAD_DIM = 8, 16, 72
CHANNELS = HEADS * HEAD_DIM
WHOLE = 1024  # tokens that the library's blocks divide
# Queries, keys in memory, keys at once.
FORWARD = ((512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024))
BACKWARD = ((512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024))


@dataclass(frozen=True)
class Subject:
    tokens: int
    dressed: bool  # with q/k norm and rotation

    @property
    def name(self) -> str:
        return f"S={self.tokens}" + ", norm and rotation" * self.dressed

    def extras(self) -> dict:
        """Options of stdit_attention."""
        if not self.dressed:
            return {}
        from opensora_jax.nn.positions import rope_frequencies, rope_table

        weights = {name: np.linspace(0.5, 1.5, HEAD_DIM, dtype="float32") for name in ("q_scale", "k_scale")}
        return weights | {"rope": rope_table(np.arange(self.tokens), rope_frequencies(HEAD_DIM))}


SUBJECTS = (Subject(1024, False), Subject(920, True))


def splash(subject: Subject, forward, backward, as_written: bool):
    """The library's kernel; dq, dk and dv of one kernel, which is its faster form. as_written: heads split by one transpose."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from opensora_jax.kernels import xla

    sizes = dict(zip(("block_q", "block_kv", "block_kv_compute"), forward))
    sizes |= dict(zip(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), backward or forward))
    mask = masks.MultiHeadMask([masks.FullMask((WHOLE, WHOLE))] * HEADS)
    run = kernel.make_splash_mha_single_device(mask, block_sizes=kernel.BlockSizes(**sizes, use_fused_bwd_kernel=True))
    extras, more = subject.extras(), WHOLE - subject.tokens
    if more:  # what fills rows up is a segment of its own
        ids = jnp.asarray(np.arange(WHOLE) >= subject.tokens, jnp.int32)
        run = functools.partial(run, segment_ids=kernel.SegmentIds(ids, ids))

    def attend(qkv):
        if as_written:  # [3, rows, heads, tokens, head_dim]
            parts = qkv.reshape(ROWS, subject.tokens, 3, HEADS, HEAD_DIM).transpose(2, 0, 3, 1, 4)
            q, k, v = (x.swapaxes(1, 2) for x in parts)
        else:
            q, k, v = (x.reshape(ROWS, subject.tokens, HEADS, HEAD_DIM) for x in jnp.split(qkv, 3, axis=-1))
        q, k = (
            xla.prepare(x, extras.get(name), extras.get("rope"), True) for x, name in ((q, "q_scale"), (k, "k_scale"))
        )
        whole = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))
        out = jax.vmap(run)(whole(q * HEAD_DIM**-0.5), whole(k), whole(v))
        return out[:, :, : subject.tokens].swapaxes(1, 2).reshape(ROWS, subject.tokens, CHANNELS)

    return attend


def of_the_library(subject: Subject, forward, backward, as_written):
    """x, (kernel, bias) of qkv and of the output → x and the projected result of attention."""
    attend = splash(subject, forward, backward, as_written)
    return lambda x, qkv, out: x + (attend(x @ qkv[0] + qkv[1]) @ out[0] + out[1])


def ours(subject: Subject):
    from opensora_jax.kernels import modulated
    from opensora_jax.kernels.stdit import stdit_attention

    def layer(x, qkv, out):
        y, x = modulated.linear(x[None], None, None, *qkv)
        return modulated.project(x, stdit_attention(y, num_heads=HEADS, **subject.extras()), None, *out)[0]

    return layer


def compile_program(subject: Subject, blocks, chip: str, topology: str, backward: bool) -> None:
    """In a process of its own; prints the program and the steps that share a row, while schedules land in the dump folder."""
    import jax
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    from opensora_jax import work
    from opensora_jax.kernels import spec

    layer = of_the_library(subject, *blocks) if blocks else ours(subject)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    linear = lambda width: (array(CHANNELS, width), array(width))
    shapes = array(ROWS, subject.tokens, CHANNELS), linear(3 * CHANNELS), linear(CHANNELS)

    def both(*given):
        y, pull = jax.vjp(layer, *given)
        return y, pull(y)

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    run = both if backward else layer
    place = lambda x: Format(Layout(tuple(range(x.ndim))), SingleDeviceSharding(device))
    with spec.target(chip):
        inputs, outputs = (jax.tree.map(place, x) for x in (shapes, jax.eval_shape(run, *shapes)))
        traced = jax.jit(run, in_shardings=inputs, out_shardings=outputs).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    print(json.dumps({"program": text, "steps_a_row": work.count(traced.jaxpr).steps_a_row()}))


def measure(subject: Subject, blocks, chip: str, backward: bool) -> dict:
    """Milliseconds outside and inside kernels; blocks: the library's, forward and backward, and whether as written, or None
    for ours."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = QUIET | {"TPU_LOG_DIR": folder, "LIBTPU_INIT_ARGS": dump_to(folder), "XLA_FLAGS": ""}
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--chips", chip]
        command += ["--compile-stock", json.dumps([SUBJECTS.index(subject), blocks])] + ["--backward"] * backward
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            refused = done.stderr.strip().splitlines()[-1][:200]
            return {"refused": refused} | dict.fromkeys(("total_ms", "xla_total_ms"), float("inf"))
        said = json.loads(done.stdout.splitlines()[-1])
        module = hlo.parse(said["program"])
        found, machine = hlo.contents(module, {}), chips.CHIPS[chip]
        outside = found.cycles / machine.clock + found.traffic / machine.bandwidth
        traffic = {op.name: module.traffic(op) for op, _, _ in module.walk() if op.is_kernel}
        scheduled = bundles.call_seconds(Path(folder), machine.clock, module.alike(), said["steps_a_row"])
        kernels = {
            name: count * max(scheduled(name), traffic[name] / machine.bandwidth)
            for name, count in found.kernel_calls.items()
        }
        cycles = sum(op.cycles * times for op, times, fused in module.walk() if not (fused or op.is_kernel))
    inside = sum(kernels.values())
    parts = {"outside_ms": outside * 1e3, "kernels_ms": {name: value * 1e3 for name, value in kernels.items()}}
    return parts | {"total_ms": 1e3 * (outside + inside), "xla_total_ms": 1e3 * (cycles / machine.clock + inside)}


def report(wanted) -> list[dict]:
    """Prints a table; its rows come back."""
    records = []
    print(
        "| program | rows | chip | pass | outside kernels ms (ESTIMATE) | kernels ms | total | against ours | "
        "total with XLA's cycles for copies | against ours |"
    )
    print("|" + "---|" * 10)

    def row(subject, name, chip, backward, blocks, against=None):
        record = {"program": name, "rows": subject.name, "chip": chip, "backward": backward}
        record |= measure(subject, blocks, chip, backward)
        records.append(record)
        cells = [name, subject.name, chip, "forward and backward" if backward else "forward"]
        cells += [record["refused"]] if "refused" in record else [
            f"{record['outside_ms']:.3f}", " + ".join(f"{value:.3f}" for value in record["kernels_ms"].values()),
            *(cell for key in ("total_ms", "xla_total_ms")
              for cell in (f"{record[key]:.3f}", f"{record[key] / against[key]:.2f}" if against else "")),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
        return record

    for chip, subject in itertools.product(wanted, SUBJECTS):
        compared = functools.partial(row, subject)
        forward, both = (compared("ours", chip, backward, None) for backward in (False, True))
        name = lambda blocks: "splash " + "/".join(map(str, blocks))
        tried = {blocks: compared(name(blocks), chip, False, (blocks, None, False), forward) for blocks in FORWARD}
        fastest = min(tried, key=lambda blocks: tried[blocks]["total_ms"])
        after = {
            blocks: compared(f"{name(fastest)}, {name(blocks)}", chip, True, (fastest, blocks, False), both)
            for blocks in BACKWARD
        }
        then = min(after, key=lambda blocks: after[blocks]["total_ms"])
        written = (
            compared(f"{name(fastest)} as written", chip, False, (fastest, None, True), forward),
            compared(f"{name(fastest)}, {name(then)} as written", chip, True, (fastest, then, True), both),
        )
        for program, (stock, stock_both) in {"best": (tried[fastest], after[then]), "as written": written}.items():
            for key in ("total_ms", "xla_total_ms"):
                alone = (stock_both[key] - stock[key]) / (both[key] - forward[key])
                print(
                    f"{chip}, {subject.name}, {program}, {key}: {stock[key] / forward[key]:.2f} forward, "
                    f"{stock_both[key] / both[key]:.2f} with backward, {alone:.2f} backward alone"
                )
    return records
