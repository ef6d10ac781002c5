"""What a plan traces, without the TPU compiler."""

from pathlib import Path

import jax
import pytest

from opensora_jax import config
from opensora_jax.common.errors import UserError
from opensora_jax.parallel import shard
from opensora_jax.plan.compile import largest, mesh_of, trace, trace_sample
from opensora_jax.training.run import RunConfig

DEBUG = Path(__file__).parents[2] / "configs/debug.py"


def test_a_sampling_step_holds_both_branches_of_guidance():
    tree = config.load(str(DEBUG), ["--config.vae.filters=4", "--config.model.depth=1"])
    cfg = config.build(RunConfig, tree, "config")
    layout = shard.layout(mesh_of(cfg.mesh, jax.devices()[:1]), cfg.mesh.rules)
    program = trace_sample(cfg, layout, largest(cfg))
    assert program.forwards == 2
    assert "dot_general" in str(program.traced.jaxpr)


def test_a_step_on_clips_holds_the_encoders():
    """It encodes pixels and captions itself, so it takes them in and keeps the encoders' parameters."""
    cfg = config.build(RunConfig, config.load(str(DEBUG), ["--config.model.depth=1"]), "config")
    layout = shard.layout(mesh_of(cfg.mesh, jax.devices()[:1]), cfg.mesh.rules)
    encoded, whole = (trace(cfg, layout, largest(cfg), clips=clips) for clips in (False, True))
    networks = whole.trainer.system.networks
    size = sum(
        leaf.size * leaf.dtype.itemsize
        for n in ("vae", "text_encoder")
        for leaf in jax.tree.leaves(networks[n].abstract)
    )
    assert set(whole.frozen) == {"vae", "text_encoder"} and not encoded.frozen
    assert whole.state_bytes == encoded.state_bytes + size
    taken = [str(leaf.shape) for leaf in jax.tree.leaves(whole.traced.in_avals) if leaf.ndim == 5]
    assert any(shape.endswith(", 32, 32, 3)") for shape in taken) and whole.model_flops == encoded.model_flops


def test_a_step_on_clips_needs_encoders():
    cfg = config.build(
        RunConfig, config.load(str(DEBUG), ["--config.text_encoder=None", "--config.text.tokenizer="]), "config"
    )
    layout = shard.layout(mesh_of(cfg.mesh, jax.devices()[:1]), cfg.mesh.rules)
    with pytest.raises(UserError, match=r"--data=clips needs config\.text_encoder"):
        trace(cfg, layout, largest(cfg), clips=True)
