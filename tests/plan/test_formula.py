"""Plans by formula: one trace for all meshes, candidates of a search, and the ranking."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from opensora_jax import config
from opensora_jax.common.errors import UserError
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig
from opensora_jax.plan import chips, formula, search, target
from opensora_jax.plan.compile import mesh_of
from opensora_jax.plan.hlo import Collective
from opensora_jax.training.run import RunConfig

GPUS = chips.parse("h100:8x1")


@pytest.fixture(scope="module")
def cfg():
    words = [
        "--config.model.remat=full",
        "--config.data.num_frames=34",
        "--config.mesh.fsdp=2",
        "--config.mesh.context=2",
    ]
    return config.build(
        RunConfig, config.load("configs/debug.py", [*words, "--config.mesh.rules=fsdp_context"]), "config"
    )


@pytest.fixture(scope="module")
def traced(cfg):
    return formula.Traced.of(target.traced(cfg, GPUS, "train"))


def test_a_trace_names_layers_and_what_they_keep(cfg, traced):
    depth, clips = cfg.model["depth"], traced.program.shape.batch
    latents = traced.program.shape.frames * traced.program.shape.height * traced.program.shape.width
    stream = 4.0 * clips * latents // 4 * cfg.model["hidden_size"]  # patches of 2x2, float32
    assert traced.shape.layers == depth
    assert traced.shape.stream == stream
    assert traced.shape.kept >= depth * stream  # full remat keeps at least what enters each layer
    assert traced.shape.widest > 4 * stream  # the MLP alone is four times as wide


def test_plans_of_other_meshes_need_no_other_trace(cfg, traced):
    here = traced.plan(cfg, GPUS)
    wide = replace(cfg, mesh=MeshConfig(1, 8, 1, rules="fsdp"))
    layout = shard.layout(mesh_of(wide.mesh, jax.devices()[:8]), "fsdp")
    there = traced.plan(wide, GPUS, formula.relaid(wide, traced.program, layout))
    assert here.source == there.source == "formula"
    assert (here.batch, there.batch) == (4 * cfg.data.batch_size, 8 * cfg.data.batch_size)
    assert there.model_flops == pytest.approx(2 * here.model_flops)
    assert {c.kind for c in here.collectives} == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert {c.kind for c in there.collectives} == {"all-gather", "reduce-scatter"}
    fresh = formula.Traced.of(target.traced(wide, GPUS, "train")).plan(wide, GPUS)
    assert fresh.memory.arguments == there.memory.arguments
    assert fresh.hardware_flops == pytest.approx(there.hardware_flops, rel=0.02)


def test_micro_batches_keep_less_and_gather_more(cfg, traced):
    halves = replace(cfg, optimizer=replace(cfg.optimizer, accumulate_steps=2))
    one, two = traced.plan(cfg, GPUS), traced.plan(halves, GPUS)
    assert two.memory.temporaries < one.memory.temporaries
    gathered = lambda plan: sum(c.moved for c in plan.collectives if c.kind == "all-gather")
    assert gathered(two) == 2 * gathered(one)


def test_a_step_of_sampling_has_no_gradients(cfg, traced):
    sampled = formula.Traced.of(target.traced(cfg, GPUS, "sample")).plan(cfg, GPUS)
    trained = traced.plan(cfg, GPUS)
    assert sampled.model_flops == pytest.approx(trained.model_flops * 2 / 3)
    assert sampled.model_flops <= sampled.hardware_flops < trained.hardware_flops
    assert sampled.memory.peak < trained.memory.peak
    assert {c.kind for c in sampled.collectives} == {"all-gather", "all-to-all"}


def test_candidates_multiply_to_the_devices(cfg):
    found = list(search.candidates(cfg, 8, "train"))
    assert {m.mesh.data * m.mesh.fsdp * m.mesh.context * m.mesh.tensor for m in found} == {8}
    assert {m.mesh.tensor for m in found} == {1, 2, 4, 8}
    assert {m.mesh.rules for m in found} == {"fsdp", "fsdp_context", "fsdp_tp", "full"}
    assert {m.model["remat"] for m in found} == set(search.REMAT)
    assert {m.optimizer.accumulate_steps for m in found} == set(search.MICRO_BATCHES)
    assert all(m.mesh.context > 1 for m in found if m.model["remat"] == "switches")
    assert len({(str(m.mesh), m.model["remat"], m.optimizer.accumulate_steps) for m in found}) == len(found) == 270


def test_a_tensor_axis_sums_the_stream(cfg, traced):
    """Two attentions, two cross-attentions and two MLPs a layer, forward, repeated and backward; weights are cut."""

    def laid(mesh):
        return formula.relaid(cfg, traced.program, shard.layout(mesh_of(mesh, jax.devices()[:8]), mesh.rules))

    alone, cut = laid(MeshConfig(8, rules="fsdp")), laid(MeshConfig(4, tensor=2, rules="fsdp_tp"))
    plan = traced.plan(cfg, GPUS, cut)
    sums = next(c for c in plan.collectives if c.axes == ("tensor",))
    assert formula.summed_products(cut) == 6 * cfg.model["depth"]
    assert (sums.kind, sums.count) == ("all-reduce", 3 * 6 * cfg.model["depth"])
    assert sums.bytes == pytest.approx(traced.shape.stream / traced.program.shape.batch * plan.batch / 4)
    assert plan.memory.arguments < traced.plan(cfg, GPUS, alone).memory.arguments
    assert formula.summed_products(laid(MeshConfig(1, tensor=8, rules="fsdp_tp"))) == 0  # there are four heads


def test_a_search_ranks_what_fits(cfg, monkeypatch):
    monkeypatch.setattr(search, "REMAT", ("full",))
    monkeypatch.setattr(search, "MICRO_BATCHES", (1, 2))
    plans = search.search(cfg, GPUS, "train", jax.devices()[:8], compile_best=1)
    assert all(plan.fits for plan in plans) and len(plans) == 38
    per_token = [plan.step_seconds / plan.tokens for plan in plans]
    assert per_token == sorted(per_token)
    small = replace(GPUS, chip=replace(GPUS.chip, memory=1e5))
    with pytest.raises(UserError, match="nothing fits"):
        search.search(cfg, small, "train", jax.devices()[:8], compile_best=0)


def test_the_formula_agrees_with_the_tpu_compiler():
    """STDiT 1.0 at full size on 8 devices: what the compiler counted (python -m benchmarks.plans stdit-v6e-8, 2026-12-01)
    against a plan for GPUs, which have nothing else. Their rates alone are the chip's."""
    cfg = config.build(RunConfig, config.load("configs/v1_0/stdit.py", ["--config.mesh.fsdp=1"]), "config")
    plan = formula.Traced.of(target.traced(cfg, GPUS, "train")).plan(cfg, GPUS)
    moved = {c.kind: c.moved for c in plan.collectives}
    assert plan.hardware_flops / 8 == pytest.approx(53.81e12, rel=1e-3)
    assert moved["all-to-all"] == pytest.approx(2312.1e6, rel=1e-3)
    assert moved["all-gather"] == pytest.approx(2629.4e6, rel=0.1)
    assert moved["reduce-scatter"] == pytest.approx(1328.0e6, rel=0.1)
    assert plan.memory.arguments == pytest.approx(1.543e9, rel=0.02)
    assert 3.30e9 < plan.memory.peak < 1.35 * 3.30e9  # never promises what does not fit


def test_only_sparse_cores_exchange_beside_computation():
    weights = Collective("all-gather", ("fsdp",), 8, "bf16", 8e6, asynchronous=True)
    stream = Collective("all-to-all", ("context",), 8, "bf16", 8e6)
    assert formula.on_sparse_cores(weights) == replace(weights, rings=2)
    assert not formula.waited_for(weights).asynchronous
    assert formula.on_sparse_cores(stream) == formula.waited_for(stream) == stream


def test_the_most_that_lives_at_once():
    def chain(x):  # x is the caller's; two values of its size live at a time
        return jnp.sin(jnp.cos(jnp.exp(x)))

    jaxpr = jax.make_jaxpr(chain)(jax.ShapeDtypeStruct((256,), jnp.float32)).jaxpr
    assert formula.moment(jaxpr) == 2 * 1024
