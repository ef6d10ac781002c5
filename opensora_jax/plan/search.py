"""`--search`: which mesh, remat policy and micro-batch fit, and which of them are fast.

Every candidate is judged by formula (one trace a remat policy serves all meshes); on a TPU topology the best few are then
compiled, and the compiler's word replaces the formula's.
"""

from collections.abc import Iterator
from dataclasses import replace

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig
from opensora_jax.plan import formula, target
from opensora_jax.plan.chips import Topology
from opensora_jax.plan.compile import largest, mesh_of
from opensora_jax.plan.estimate import Plan
from opensora_jax.training.run import RunConfig

REMAT = ("none", "names", "full")
MICRO_BATCHES = (1, 2, 4)
WIDEST_CONTEXT = 64


def meshes(devices: int, limit: int) -> Iterator[MeshConfig]:
    """Powers of two of context and fsdp, data takes the rest. limit: of the context axis."""
    context = 1
    while context <= min(limit, devices):
        fsdp = 1
        while context * fsdp <= devices:
            if devices % (context * fsdp) == 0:
                rules = "fsdp_context" if context > 1 else "fsdp"
                yield MeshConfig(devices // (context * fsdp), fsdp, context, rules=rules)
            fsdp *= 2
        context *= 2


def candidates(cfg: RunConfig, devices: int, task: str) -> Iterator[RunConfig]:
    remat = (cfg.model.get("remat", "none"),) if task == "sample" else REMAT
    micro = (1,) if task == "sample" else MICRO_BATCHES
    clips = largest(cfg).clips
    for policy in remat:
        for mesh in meshes(devices, WIDEST_CONTEXT):
            for parts in micro:
                if clips % parts == 0:  # a micro-batch holds whole clips of every group
                    changed = replace(cfg, model={**cfg.model, "remat": policy})
                    changed = replace(changed, mesh=replace(mesh, attention=cfg.mesh.attention))
                    yield replace(changed, optimizer=replace(cfg.optimizer, accumulate_steps=parts))


def search(cfg: RunConfig, topology: Topology, task: str, devices: list, compile_best: int) -> list[Plan]:
    """Those that fit first, fastest a clip first; compiled ones (on a TPU topology) before the formula's."""
    known: dict[str, formula.Traced] = {}
    ranked: list[tuple[Plan, RunConfig]] = []
    for candidate in candidates(cfg, topology.devices, task):
        policy = str(candidate.model.get("remat", "none"))
        if policy not in known:
            one = replace(candidate, optimizer=replace(candidate.optimizer, accumulate_steps=1))
            known[policy] = formula.Traced.of(target.traced(one, topology, task, devices=devices))
        traced = known[policy]
        layout = shard.layout(mesh_of(candidate.mesh, devices), candidate.mesh.rules, cfg.mesh.attention)
        plan = traced.plan(candidate, topology, formula.relaid(candidate, traced.program, layout))
        ranked.append((plan, candidate))
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
