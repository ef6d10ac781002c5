"""A plan in words and in JSON."""

import json
from collections import defaultdict

from opensora_jax.plan.estimate import Plan, gigabytes


def text(plan: Plan) -> str:
    chip, memory = plan.topology.chip, plan.memory
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    formula = "" if plan.source == "compiler" else " (FORMULA, nothing was compiled)"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    milliseconds = lambda seconds: f"{seconds * 1e3:,.1f} ms"
    rows = [
        ("topology", f"{plan.topology.name}: {plan.topology.chips} chips, {plan.topology.devices} devices"),
        ("mesh", f"{mesh}, rules {plan.rules}, remat {plan.remat}"),
        ("bucket", plan.bucket),
        ("batch", f"{plan.batch} clips, {plan.tokens:,} tokens a step"),
        ("parameters", f"{plan.parameters:,}, {plan.trainable:,} of them trainable"),
        ("arguments / device", gigabytes(memory.arguments)),
        ("temporaries / device", gigabytes(memory.temporaries + memory.outputs + memory.code)),
        ("peak / device", f"{gigabytes(memory.peak)} of {gigabytes(chip.memory)}: {verdict}{formula}"),
        ("model FLOPs", f"{plan.model_flops / 1e12:,.1f} TFLOP a step, {per_device(plan, plan.model_flops)} a device"),
        ("hardware FLOPs", f"{plan.hardware_flops / 1e12:,.1f} TFLOP a step, with remat and padding"),
        ("compute", f"{milliseconds(plan.compute_seconds)} ESTIMATE"),
        ("  fusions", f"{milliseconds(plan.fusion_seconds)} by {plan.fusions_from}"),
        ("  kernels", f"{milliseconds(plan.kernel_seconds)} by {plan.kernels_from}"),
        *kernels(plan),
        ("communication", f"{milliseconds(plan.communication_seconds)} ESTIMATE, bytes over link rates"),
        ("  waited for", milliseconds(plan.exposed_seconds)),
        *exchanges(plan),
        ("step", f"{milliseconds(plan.step_seconds)} ESTIMATE"),
        ("MFU", f"{plan.mfu:.1%} ESTIMATE (hardware FLOPs {plan.hfu:.1%})"),
    ]
    if plan.compile_seconds:
        rows.append(("compiled in", f"{plan.compile_seconds:.0f} s"))
    rows += [("change", line) for line in plan.advice()]
    rows += [("note", line) for line in plan.notes]
    width = max(22, *(len(name) + 2 for name, _ in rows))
    return "\n".join(f"{name:{width}s}{value}" for name, value in rows)


def kernels(plan: Plan) -> list[tuple[str, str]]:
    """One row a kernel, longest first."""
    parts = sorted(plan.kernel_parts.items(), key=lambda part: -part[1][1])
    return [(f"    {name}", f"{seconds * 1e3:,.1f} ms in {calls} calls") for name, (calls, seconds) in parts]


def exchanges(plan: Plan) -> list[tuple[str, str]]:
    """One row a kind and mesh axes, most bytes first."""
    total = defaultdict(lambda: [0, 0.0, 0.0])
    for collective, seconds in zip(plan.collectives, plan.collective_seconds):
        entry = total[collective.kind, "+".join(collective.axes)]
        for i, amount in enumerate((collective.count, collective.moved, seconds)):
            entry[i] += amount
    return [
        (f"  {kind}", f"{moved / 1e6:,.1f} MB in {count} over {axes or '-'}, {seconds * 1e3:,.1f} ms")
        for (kind, axes), (count, moved, seconds) in sorted(total.items(), key=lambda item: -item[1][1])
    ]


def per_device(plan: Plan, flops: float) -> str:
    return f"{flops / plan.topology.devices / 1e12:,.2f}"


def as_json(plans: list[Plan]) -> str:
    found = [plan.summary() for plan in plans]
    return json.dumps(found[0] if len(found) == 1 else found, indent=1)


def table(plans: list[Plan]) -> str:
    """A ranking."""
    lines = [
        "| mesh | remat | clips | peak / device | fits | step (ESTIMATE) | MFU (ESTIMATE) | by |",
        "|" + "---|" * 8,
    ]
    for plan in plans:
        mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
        cells = [
            f"{mesh} {plan.rules}", plan.remat, str(plan.batch), gigabytes(plan.memory.peak),
            "yes" if plan.fits else "no", f"{plan.step_seconds * 1e3:,.0f} ms", f"{plan.mfu:.1%}", plan.source,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
