"""`--search`: which mesh, remat policy and micro-batch fit, and which of them are fast.

Every candidate is judged by formula (a trace or two a remat policy serve all meshes); on a TPU topology the best few are then
compiled, and the compiler's word replaces the formula's.
"""

from collections.abc import Iterator
from dataclasses import replace

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig
from opensora_jax.plan import formula, target
from opensora_jax.plan.chips import Topology
from opensora_jax.plan.compile import Program, largest, mesh_of
from opensora_jax.plan.estimate import Plan
from opensora_jax.training.run import RunConfig

REMAT = ("none", "names", "spatial", "switches", "full")
MICRO_BATCHES = (1, 2, 4)
WIDEST_CONTEXT = 64
WIDEST_TENSOR = 8  # two sums of the stream a layer and pass: no further than one machine of GPUs
RULES = {(False, False): "fsdp", (True, False): "fsdp_context", (False, True): "fsdp_tp", (True, True): "full"}


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Powers of two of tensor, context and fsdp, data takes the rest."""
    for tensor in powers(min(WIDEST_TENSOR, devices)):
        for context in powers(min(WIDEST_CONTEXT, devices // tensor)):
            for fsdp in powers(devices // (tensor * context)):
                taken = tensor * context * fsdp
                if devices % taken == 0:
                    rules = RULES[context > 1, tensor > 1]
                    yield MeshConfig(devices // taken, fsdp, context, tensor, rules=rules)


def powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def candidates(cfg: RunConfig, devices: int, task: str) -> Iterator[RunConfig]:
    remat = (cfg.model.get("remat", "none"),) if task == "sample" else REMAT
    micro = (1,) if task == "sample" else MICRO_BATCHES
    clips = largest(cfg).clips
    for policy in remat:
        for mesh in meshes(devices):
            if policy == "switches" and mesh.context == 1 and task != "sample":
                continue  # "full" by another name
            for parts in micro:
                if clips % parts == 0:  # a micro-batch holds whole clips of every group
                    changed = replace(cfg, model={**cfg.model, "remat": policy})
                    changed = replace(changed, mesh=replace(mesh, attention=cfg.mesh.attention))
                    yield replace(changed, optimizer=replace(cfg.optimizer, accumulate_steps=parts))


def search(cfg: RunConfig, topology: Topology, task: str, devices: list, compile_best: int) -> list[Plan]:
    """Those that fit first, fastest a clip first; compiled ones (on a TPU topology) before the formula's."""
    known: dict[tuple[str, bool], formula.Traced] = {}  # what is switched can be kept only where there are switches
    laid: dict[MeshConfig, Program] = {}
    ranked: list[tuple[Plan, RunConfig]] = []
    for candidate in candidates(cfg, topology.devices, task):
        mesh = candidate.mesh
        kind = str(candidate.model.get("remat", "none")), mesh.context > 1
        if kind not in known:
            one = replace(candidate, optimizer=replace(candidate.optimizer, accumulate_steps=1))
            known[kind] = formula.Traced.of(target.traced(one, topology, task, devices=devices))
        traced = known[kind]
        if mesh not in laid:
            layout = shard.layout(mesh_of(mesh, devices), mesh.rules, mesh.attention)
            laid[mesh] = formula.relaid(candidate, traced.program, layout)
        if mesh.tensor == 1 or formula.summed_products(laid[mesh]):
            ranked.append((traced.plan(candidate, topology, laid[mesh]), candidate))
    ranked.sort(key=lambda pair: order(pair[0]))
    if not ranked or not ranked[0][0].fits:
        least = min((plan for plan, _ in ranked), key=lambda plan: plan.memory.peak, default=None)
        need = f"; the least is {least.memory.peak / 1e9:.0f} GB a device" if least else ""
        raise UserError(f"--search: nothing fits {topology.name}{need}: take more chips or fewer clips")
    compiled = []
    if topology.chip.is_tpu:
        best = [candidate for plan, candidate in ranked if plan.fits][:compile_best]
        compiled = sorted((target.compiled(candidate, topology, task) for candidate in best), key=order)
        ranked = ranked[len(best) :]
    return compiled + [plan for plan, _ in ranked]


def order(plan: Plan) -> tuple:
    """Seconds of one token on one chip, those that fit first."""
    return not plan.fits, plan.step_seconds * plan.topology.devices / plan.tokens
