"""The same figures without a compiler: for GPUs, and to choose what is worth compiling. Marked FORMULA in every report.

Memory: the state's own shards, the activations that the traced backward pass keeps, and the widest moment of one layer,
cut by the mesh. FLOPs are counted in the trace. Compute is FLOPs over a share of the chip's peak; exchanges are those that
the layout needs: weights gathered for the forward and the backward pass, gradients scattered, activations switched, and
summed where `tensor` cuts a product.
docs/performance.md, section "Plans", holds these against the compiler's figures.
"""

import math
from dataclasses import dataclass, replace

import jax
from jax.extend.core import Literal

from opensora_jax import work
from opensora_jax.parallel.shard import Layout
from opensora_jax.plan import estimate, target
from opensora_jax.plan.chips import Topology
from opensora_jax.plan.compile import Program, frozen_params, network_params
from opensora_jax.plan.hlo import Collective
from opensora_jax.plan.links import Links
from opensora_jax.trainer import Trainer
from opensora_jax.training import optimizer
from opensora_jax.training.run import RunConfig
from opensora_jax.training.state import abstract_state

# Of peak, in fused code. STDiT 1.0 compiles for v6e to 0.49 by static schedules of its kernels, and to 0.65 there and 0.87 on v5p
# by their roofline (2026-11-29); the others were not compiled.
EFFICIENCY = {"gpu": 0.45, "v4": 0.45, "v5e": 0.4, "v5p": 0.6, "v6e": 0.5, "tpu7x": 0.3}
FUSED = 0.9  # of a layer's values at one moment, what the compiler leaves after fusion (STDiT 1.0 on v6e:2x4: 0.83)
ENCODERS = "what VAE and text encoder keep while they run is not counted: compile for a TPU topology to know"
FULL_ATTENTION = ("dit", "mmdit", "pixart")  # every token sees every other: q, k, v and o change places


@dataclass(frozen=True)
class Shape:
    """What a trace says about memory and layers, over all devices."""

    kept: float  # bytes of activations that the loops over layers keep for the backward pass
    widest: float  # bytes alive at one moment inside a layer
    stream: float  # bytes of the tokens that travel from layer to layer
    layers: int


@dataclass(frozen=True)
class Traced:
    """One trace serves every mesh: what it says grows with the clips of a batch."""

    program: Program
    shape: Shape
    work: work.Work

    @classmethod
    def of(cls, program: Program) -> "Traced":
        return cls(program, shape_of(program), work.count(program.traced.jaxpr))

    def plan(self, cfg: RunConfig, topology: Topology, program: Program | None = None) -> estimate.Plan:
        """program: the same step laid out on another mesh, `relaid`."""
        program = program or self.program
        larger = program.shape.batch / self.program.shape.batch
        layout, shape = program.layout, self.shape
        parts = math.prod(layout.sizes[a] for a in layout.axes_of("batch")) * activation_shards(layout)
        micro = cfg.optimizer.accumulate_steps
        widest = shape.stream + (shape.widest - shape.stream) / tensor_ways(layout)  # `tensor` leaves the stream whole
        kept = larger * (shape.kept + FUSED * widest) / parts / micro
        share = EFFICIENCY.get(topology.chip.name, EFFICIENCY["gpu"])
        flops = larger * self.work.flops
        remat = str(cfg.model.get("remat", "none"))
        found = exchanges(program, replace(shape, stream=larger * shape.stream), micro, remat)
        if topology.chip.is_tpu:
            found = tuple(map(on_sparse_cores if topology.chip.offloads else waited_for, found))
        links = Links.of(topology, layout.sizes, layout.mesh.devices if topology.chip.is_tpu else None)
        return replace(
            target.described(cfg, topology, program),
            memory=estimate.Memory(program.state_bytes, gradients(program) + kept),
            hardware_flops=flops,
            fusion_seconds=flops / topology.devices / topology.chip.flops / share,
            fusions_from=f"all FLOPs at {share:.0%} of peak, kernels included",
            kernels_from="the line above",
            collectives=found,
            collective_seconds=estimate.timed(found, links),
            notes=("by formula: no program was compiled", *(ENCODERS,) * bool(program.frozen)),
        )


def on_sparse_cores(exchange: Collective) -> Collective:
    """They send both ways around one ring of all devices (read from compiled programs of v5p and v6e)."""
    return replace(exchange, rings=2) if exchange.asynchronous else exchange


def waited_for(exchange: Collective) -> Collective:
    """Without sparse cores libtpu 0.0.51 starts no exchange ahead of its use."""
    return replace(exchange, asynchronous=False)


def relaid(cfg: RunConfig, program: Program, layout: Layout) -> Program:
    """The same step on another mesh, without tracing it again."""
    trainer = Trainer(cfg, program.trainer.assembly, layout)
    network = trainer.trained_network()
    if program.forwards == 3:
        tx = optimizer.make(cfg.optimizer, cfg.steps, optimizer.trainable(network.trainable, cfg.optimizer.freeze))
        held = abstract_state(network, tx, layout)
    else:
        held = network_params(network, layout)
    rows = program.workload.clips * trainer.data_shards * cfg.data.batch_scale
    shape, frozen = replace(program.shape, batch=rows), frozen_params(trainer) if program.frozen else None
    return replace(program, trainer=trainer, layout=layout, held=held, frozen=frozen, shape=shape)


def gradients(program: Program) -> float:
    """Bytes on a device: one copy of what is trained, beside the state."""
    params = program.held.get("params", {}) if isinstance(program.held, dict) else {}
    mask = program.trainer.trained_network().trainable if program.forwards == 3 else None
    if mask is None:
        return 0.0
    share = lambda leaf, yes: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize if yes else 0
    return float(sum(jax.tree.leaves(jax.tree.map(share, params, mask))))


def activation_shards(layout: Layout) -> int:
    axes = layout.axes_of("frames") or layout.axes_of("tokens")
    return math.prod(layout.sizes[axis] for axis in axes)


def shape_of(program: Program) -> Shape:
    """Loops over layers are the scans over stacked parameters, wherever they stand."""
    stacked = {leaf.shape for leaf in jax.tree.leaves(program.trainer.trained_network().abstract)}
    kept, widest, stream, layers = 0.0, 0.0, 0.0, 0
    for eqn, spread in scans(program.traced.jaxpr.jaxpr):
        constants, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        if not any(v.aval.shape in stacked for v in eqn.invars[constants + carries :]):
            continue
        outputs = [v.aval for v in eqn.outvars[carries:]]
        kept += spread * sum(size(aval) for aval in outputs if aval.shape not in stacked)
        widest = max(widest, spread * moment(eqn.params["jaxpr"].jaxpr))
        stream = max(stream, *(spread * size(v.aval) for v in eqn.outvars[:carries]))
        if not any(aval.shape in stacked for aval in outputs):  # the forward pass
            layers += eqn.params["length"]
    return Shape(kept, widest, stream, layers)


def tensor_ways(layout: Layout) -> int:
    return math.prod(layout.sizes[axis] for axis in layout.axes_of("mlp"))


def summed_products(program: Program) -> int:
    """Products of all layers whose inputs `tensor` cuts, so that its devices add up what each of them found; none where
    it does not divide the heads, of which no device can hold a part."""
    network, layout = program.trainer.trained_network(), program.layout
    axes, heads = set(layout.axes_of("mlp")), getattr(program.trainer.system.denoiser.config, "num_heads", 0)
    if heads % tensor_ways(layout):
        return 0

    def of(leaf, names) -> int:
        if names[:1] != ("layers",) or names[-1] != "embed" or not axes:
            return 0
        cut = layout.spec(names, leaf.shape)
        return leaf.shape[0] * any(axes & set(entry if isinstance(entry, tuple) else (entry,)) for entry in cut)

    return sum(jax.tree.leaves(jax.tree.map(of, network.abstract, network.axes)))


def exchanges(program: Program, shape: Shape, micro: int, remat: str) -> tuple[Collective, ...]:
    """Weights are gathered and gradients scattered once a micro-batch; sampling runs two branches of guidance."""
    layout, found = program.layout, []
    train = program.forwards == 3
    cut = list(layout.axes_of("embed"))
    width = math.prod(layout.sizes[axis] for axis in cut)
    params = program.trainer.trained_network().count()
    if width > 1:
        passes = 2 * micro if train else 1
        found.append(Collective("all-gather", tuple(cut), width, "bf16", 2.0 * params, passes, asynchronous=True))
        if train:
            found.append(
                Collective("reduce-scatter", tuple(cut), width, "bf16", 2.0 * params, micro, asynchronous=True)
            )
    copies = [axis for axis in layout.axes_of("batch") if axis not in cut]
    many = math.prod(layout.sizes[axis] for axis in copies)
    if many > 1 and train:
        found.append(Collective("all-reduce", tuple(copies), many, "f32", 4.0 * params / width, asynchronous=True))
    axes = layout.axes_of("frames") or layout.axes_of("tokens")
    parts = activation_shards(layout)
    local = shape.stream / program.trainer.data_shards / parts
    if parts > 1:
        full = program.trainer.system.denoiser.family in FULL_ATTENTION
        repeated = train and (remat in ("full", "spatial") or (full and remat != "none"))  # half of those of a pass
        count = int((4 if full else 2) * (2.5 if repeated else 2) * shape.layers)
        found.append(Collective("all-to-all", axes, parts, "bf16", local, count))
    sums = summed_products(program)
    if sums:  # of results forward, of their inputs' gradients backward
        passes = (2 if remat == "none" else 3) if train else 2
        ways = tensor_ways(layout)
        found.append(Collective("all-reduce", layout.axes_of("mlp"), ways, "bf16", local, sums * passes))
    return tuple(found)


def size(aval) -> float:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0.0


def scans(jaxpr, spread: int = 1):
    """Loops of a program, outermost ones, each with how many devices run it on shapes of their own."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn, spread
        elif eqn.primitive.name != "pallas_call":
            wider = spread * (eqn.params["mesh"].size if eqn.primitive.name == "shard_map" else 1)
            for inner in work.inner_jaxprs(eqn.params):
                yield from scans(inner, wider)


def moment(jaxpr) -> float:
    """Bytes of the most values that are alive at once, if every one were written to memory."""
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, Literal):
                last[v] = i
    for v in jaxpr.outvars:
        if not isinstance(v, Literal):
            last[v] = len(jaxpr.eqns)
    own, alive, peak = set(), 0.0, 0.0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = 0.0
        if eqn.primitive.name not in ("scan", "pallas_call"):
            spread = eqn.params["mesh"].size if eqn.primitive.name == "shard_map" else 1
            inner = spread * max((moment(found) for found in work.inner_jaxprs(eqn.params)), default=0.0)
        for v in eqn.outvars:
            if v in last:
                own.add(v)
                alive += size(v.aval)
        peak = max(peak, alive + inner)
        for v in {v for v in eqn.invars if not isinstance(v, Literal)}:
            if v in own and last[v] == i:
                own.discard(v)
                alive -= size(v.aval)
    return peak
