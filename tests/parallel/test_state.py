"""The train state on a mesh: optimizer and EMA follow their parameters; a checkpoint moves between meshes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.pipeline import assemble
from opensora_jax.training import optimizer
from opensora_jax.training.checkpoint import CheckpointConfig, Checkpoints
from opensora_jax.training.state import abstract_state
from tests.parallel.conftest import MESHES, layout_of


@pytest.fixture(scope="module")
def described(debug):
    """Layout → abstract state of the debug run."""
    network = assemble(debug, weightless=True).system.networks["denoiser"]
    tx = optimizer.make(debug.optimizer, debug.steps, optimizer.trainable(network.trainable, debug.optimizer.freeze))
    return lambda layout: abstract_state(network, tx, layout)


def filled(abstract):
    """A state with different numbers in every element, placed as described."""
    leaves, tree = jax.tree.flatten(abstract)
    host = [np.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype) + i for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [jax.device_put(a, leaf.sharding) for a, leaf in zip(host, leaves)])


@pytest.mark.parametrize("preset", MESHES)
def test_optimizer_and_ema_lie_like_their_parameters(described, preset):
    state = described(layout_of(preset))
    params = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}
    followed = dict.fromkeys(params, 0)
    for item in ("ema", "opt"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(state[item]):
            name = next((n for n in params if jax.tree_util.keystr(path).endswith(n)), None)
            if name is None:
                assert leaf.ndim == 0 and leaf.sharding.is_fully_replicated, path
                continue
            assert leaf.shape == params[name].shape, path
            assert preset == "zero" or leaf.sharding == params[name].sharding, path
            followed[name] += 1
    # EMA and both moments; what is not trained has no moments
    assert {n: c for n, c in followed.items() if c != 3} == {"['rope_freqs']": 1, "['y_embedder']['null']": 1}
    cut = [n for n, leaf in params.items() if not leaf.sharding.is_fully_replicated]
    assert bool(cut) == (preset not in ("dp", "zero"))
    kept = [leaf for leaf in jax.tree.leaves((state["ema"], state["opt"])) if not leaf.sharding.is_fully_replicated]
    assert bool(kept) == (preset != "dp")


@pytest.mark.parametrize(
    ("saved_on", "read_on"), [("fsdp", "full"), ("full", "dp"), ("fsdp_context", "one device"), ("zero", "fsdp")]
)
def test_a_checkpoint_moves_to_another_mesh(described, tmp_path, saved_on, read_on):
    state = filled(described(layout_of(saved_on)))
    state["step"] = jnp.int32(7)
    writer = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    writer.save(state, {"seed": 1}, {"step": 7})
    writer.close()
    alone = shard.layout(make_mesh(MeshConfig(data=1), jax.devices()[:1]), "dp")
    wanted = described(alone if read_on == "one device" else layout_of(read_on))
    found, meta, data = Checkpoints(tmp_path, read_only=True).restore(wanted)
    assert meta["step"] == 7 and data == {"step": 7} and int(found["step"]) == 7
    for (path, a), b, to in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b), err_msg=jax.tree_util.keystr(path))
        assert a.sharding == to.sharding, path


def test_a_checkpoint_of_another_model_is_one_sentence(described, debug, tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    state = filled(described(layout_of("fsdp")))
    state["step"] = jnp.int32(1)
    writer.save(state, {}, {})
    writer.close()
    wider = replace(debug, model=dict(debug.model) | {"hidden_size": 96})
    network = assemble(wider, weightless=True).system.networks["denoiser"]
    tx = optimizer.make(wider.optimizer, wider.steps, network.trainable)
    with pytest.raises(UserError, match="does not fit this config's model or optimizer") as caught:
        Checkpoints(tmp_path, read_only=True).restore(abstract_state(network, tx, layout_of("dp")))
    assert "\n" not in str(caught.value)
