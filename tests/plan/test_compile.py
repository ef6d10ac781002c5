"""What a plan traces, without the TPU compiler."""

from pathlib import Path

import jax

from opensora_jax import config
from opensora_jax.parallel import shard
from opensora_jax.plan.compile import largest, mesh_of, trace_sample
from opensora_jax.training.run import RunConfig

DEBUG = Path(__file__).parents[2] / "configs/debug.py"


def test_a_sampling_step_holds_both_branches_of_guidance():
    tree = config.load(str(DEBUG), ["--config.vae.filters=4", "--config.model.depth=1"])
    cfg = config.build(RunConfig, tree, "config")
    layout = shard.layout(mesh_of(cfg.mesh, jax.devices()[:1]), cfg.mesh.rules)
    program = trace_sample(cfg, layout, largest(cfg))
    assert program.forwards == 2
    assert "dot_general" in str(program.traced.jaxpr)
