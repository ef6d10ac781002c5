"""Other families through the public trainer: Open-Sora 2.0's network on encoded clips, a network of classes."""

import numpy as np
import pytest

from opensora_jax import train
from opensora_jax.common.errors import UserError
from opensora_jax.data.records import ShardWriter, write_manifest
from opensora_jax.training.metrics import read_jsonl

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "steps": 2, "precision": "float32", "model": %r, "objective": %r,
        "text": {"dropout": 0.0, "max_length": 4}, "data": {"source": %r, "batch_size": 1, "allow_starving": True},
        "log": {"every_steps": 1, "tensorboard": False}, "checkpoint": {"every_steps": 2},
    })
"""
MMDIT = dict(
    family="mmdit", in_channels=16, vec_in_dim=6, context_in_dim=8, hidden_size=24, num_heads=2, depth=1,
    depth_single_blocks=1, axes_dim=(4, 4, 4), mlp_ratio=2.0,
)  # fmt: skip
DIT = dict(family="dit", condition="label_6", patch_size=(2, 2), hidden_size=24, depth=1, num_heads=2)


@pytest.fixture
def run(tmp_path):
    """Two steps of a network on 16 encoded clips whose captions are numbers; the losses."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    facts = dict(num_frames=9, fps=8.0, height=32, width=32, text_mask=np.ones(4, np.int32))
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(16):
            arrays = {"latents": draw(3, 4, 4, 4), "text_emb": draw(4, 8), "y_vec": draw(6)}
            writer.write({"id": f"clip-{i}", "text": str(i % 7), **facts, **arrays})
    write_manifest(tmp_path / "data")

    def run(model, objective, *flags):
        path = tmp_path / "config.py"
        path.write_text(CONFIG % (model, objective, str(tmp_path / "data")))
        assert train.main([f"--config={path}", f"--workdir={tmp_path / 'run'}", *flags]) == 0
        return [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]

    return run


def test_mmdit(run):
    losses = run(MMDIT, {"name": "rectified_flow", "preset": "V2_0"})
    assert len(losses) == 2 and np.isfinite(losses).all()
    with pytest.raises(UserError, match=r"no text_emb and y_vec of an empty prompt"):
        run(MMDIT, {"name": "rectified_flow", "preset": "V2_0"}, "--config.text.dropout=0.3", "--config.steps=3")


def test_classes(run):
    with pytest.raises(UserError, match="a number below 6, got '6'"):
        run(DIT, {"name": "iddpm", "preset": "V1_0"}, "--config.steps=9")
    losses = run(DIT | {"condition": "label_7"}, {"name": "iddpm", "preset": "V1_0"}, "--config.text.dropout=0.1")
    assert len(losses) == 2 and np.isfinite(losses).all()
