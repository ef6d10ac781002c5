"""One step for one topology: traced, compiled by the TPU compiler, read, and turned into a Plan."""

import functools
import time
from dataclasses import replace
from pathlib import Path

import jax

from opensora_jax import work
from opensora_jax.common.errors import UserError
from opensora_jax.parallel import shard
from opensora_jax.plan import bundles, estimate, hlo, libtpu, replay
from opensora_jax.plan.chips import Topology
from opensora_jax.plan.compile import Program, Workload, largest, mesh_of, trace, trace_sample
from opensora_jax.plan.links import Links
from opensora_jax.training.run import RunConfig

KERNEL_TARGETS = {"tpu7x": "v7x"}  # kernels/spec.py's name where it differs from the topology's
LOWER_BOUND = "roofline of their matmuls and traffic, a lower bound"
STAND_IN = "v5p"  # GPU plans are traced with our TPU kernels: like a GPU's, they never write scores to memory
TRACES = {"train": trace, "train on clips": functools.partial(trace, clips=True), "sample": trace_sample}


def describe(topology: Topology) -> list:
    """Devices that a mesh can be made of: of the TPU compiler, or as many fake ones of this CPU."""
    if topology.chip.is_tpu:
        return libtpu.devices(topology)
    found = jax.devices("cpu")
    if len(found) < topology.devices:
        raise UserError(
            f"--topology={topology.name} needs {topology.devices} CPU devices, but JAX was started with fewer"
        )
    return found[: topology.devices]


def traced(cfg: RunConfig, topology: Topology, task: str, workload: Workload | None = None, devices=None) -> Program:
    """task: a key of TRACES. devices: described ones, by default the topology's own."""
    if cfg.task != "diffusion":
        raise UserError(f"plan: task={cfg.task!r} is not planned; --config.dry_run=True says what such a step holds")
    devices = describe(topology) if devices is None else devices
    layout = shard.layout(mesh_of(cfg.mesh, devices), cfg.mesh.rules, cfg.mesh.attention)
    name = topology.chip.name if topology.chip.is_tpu else STAND_IN
    target = KERNEL_TARGETS.get(name, name)
    return TRACES[task](cfg, layout, workload or largest(cfg), target)


def compiled(
    cfg: RunConfig, topology: Topology, task: str = "train", hlo_file: str = "", schedules: str = ""
) -> estimate.Plan:
    """By the TPU compiler, on this machine. schedules: where libtpu writes those of our kernels, if it does."""
    program = traced(cfg, topology, task)
    began = time.monotonic()
    executable, text = libtpu.compiled(program.lower())
    seconds = time.monotonic() - began
    if hlo_file:
        Path(hlo_file).write_text(text)
    sizes, module = program.layout.sizes, hlo.parse(text)
    inside = hlo.contents(module, sizes)
    stats = executable.memory_analysis()
    memory = estimate.Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
        stats.generated_code_size_in_bytes,
    )
    arithmetic = work.count(program.traced.jaxpr)
    links = Links.of(topology, sizes, program.layout.mesh.devices)
    plan = described(cfg, topology, program)
    at_best, kernels_from = estimate.call_seconds(arithmetic.kernels, topology), LOWER_BOUND
    kernel_seconds = {name: at_best(name) for name in inside.kernel_calls}
    if schedules:
        scheduled = bundles.call_seconds(Path(schedules), topology.chip.clock, module.alike(), arithmetic.steps_a_row())
        kernel_seconds = {name: max(least, scheduled(name)) for name, least in kernel_seconds.items()}
        kernels_from = "their static schedules"

    parts = {}
    for name, times in inside.kernel_calls.items():
        own = bundles.kernel_name(name)
        calls, seconds_of = parts.get(own, (0, 0.0))
        parts[own] = calls + times, seconds_of + times * kernel_seconds[name]

    def compute(op: hlo.Instruction) -> float:
        if op.name in kernel_seconds:
            return kernel_seconds[op.name]
        if op.opcode in hlo.MOVES:
            return module.traffic(op) / topology.chip.bandwidth
        return op.cycles / topology.chip.clock

    def exchange(op: hlo.Instruction) -> float:
        return sum(links.seconds(collective) for collective in hlo.exchanges(op, module, sizes))

    return replace(
        plan,
        source="compiler",
        memory=memory,
        hardware_flops=arithmetic.flops,
        fusion_seconds=inside.cycles / topology.chip.clock + inside.traffic / topology.chip.bandwidth,
        fusions_from="the compiler's cycles; copies and bare sums by their traffic",
        kernels=tuple(arithmetic.kernels),
        kernel_parts=parts,
        kernel_seconds=sum(seconds_of for _, seconds_of in parts.values()),
        kernels_from=kernels_from,
        collectives=inside.collectives,
        collective_seconds=estimate.timed(inside.collectives, links),
        waited_seconds=replay.waited(module, exchange, compute),
        compile_seconds=seconds,
        notes=notes(topology, arithmetic),
    )


def described(cfg: RunConfig, topology: Topology, program: Program) -> estimate.Plan:
    """What is known before anything is compiled."""
    from flax import nnx

    network, shape, w = program.trainer.trained_network(), program.shape, program.workload
    patch = getattr(program.trainer.system.denoiser.config, "patch_size", (1, 1, 1))
    patch = (1, patch, patch) if isinstance(patch, int) else (*(1,) * (3 - len(patch)), *patch)
    tokens = shape.batch
    for size, side in zip((shape.frames, shape.height, shape.width), patch):
        tokens *= -(-size // side)
    return estimate.Plan(
        topology=topology,
        source="formula",
        mesh=program.layout.sizes,
        rules=cfg.mesh.rules,
        remat=str(cfg.model.get("remat", "none")),
        bucket=f"{w.name}: {w.frames} frames of {w.height}x{w.width}, latents {shape.frames}x{shape.height}x{shape.width}",
        batch=shape.batch,
        tokens=tokens,
        parameters=network.count(),
        trainable=network.count(nnx.Param),
        memory=estimate.Memory(program.state_bytes, 0),
        model_flops=program.model_flops,
        hardware_flops=0.0,
        fusion_seconds=0.0,
        fusions_from="",
        kernel_seconds=0.0,
        kernels_from="",
    )


def notes(topology: Topology, arithmetic: work.Work) -> tuple[str, ...]:
    said = []
    if topology.chip.name in ("v5p", "v4"):
        said.append("cycles of elementwise fusions are up to 2.7 times too many on this chip; v6e's are within 16%")
    if arithmetic.unknown_loops:
        said.append(f"{arithmetic.unknown_loops} loops of unknown length are counted once in the hardware FLOPs")
    return tuple(said)
