"""Updates do not depend on where the optimizer state lies: cut over devices that hold all parameters, with the host."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from opensora_jax.common.errors import UserError
from opensora_jax.nn.stack import run_stack
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.pipeline import assemble
from opensora_jax.trainer import Trainer
from opensora_jax.training import optimizer
from opensora_jax.training.state import abstract_state, init_state
from tests.parallel.conftest import layout_of
from tests.parallel.test_equality import batch_of, noisy


def two_updates(debug, layout, **settings):
    """The state after two updates, each over two micro-batches."""
    options = replace(debug.optimizer, accumulate_steps=2, eps=1e-3, warmup_steps=0, **settings)
    cfg = replace(debug, optimizer=options, model=debug.model | {"depth": 1, "hidden_size": 24})
    with shard.use(layout):
        trainer = Trainer(cfg, assemble(cfg, weightless=True), layout)
        network = trainer.trained_network()
        tx = optimizer.make(options, cfg.steps, network.trainable)
        abstract = abstract_state(network, tx, layout, offload=options.offload)
        params = noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), network.abstract))
        placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract["params"]))
        state = init_state(network, tx, abstract, None, placed)
        batch = shard.place_batch(batch_of((2, 4, 4)), layout)
        step = trainer.compile_step(tx, abstract).lower(state, batch, {}).compile()
        for _ in range(2):
            state, metrics = step(state, batch, {})
    return state, metrics


def test_zero_with_moments_on_the_host_equals_one_device(debug):
    alone = shard.layout(make_mesh(MeshConfig(data=1), jax.devices()[:1]), "dp")
    expected, metrics = two_updates(debug, alone)
    found, ours = two_updates(debug, layout_of("zero"), offload=True)
    np.testing.assert_allclose(ours["loss"], metrics["loss"], rtol=1e-6)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found["params"]))
    moments = [leaf for leaf in jax.tree.leaves(found["opt"]) if leaf.ndim]
    assert moments and {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}
    for item in ("opt", "ema"):  # a quarter of whatever divides by four
        whole = sum(leaf.size for leaf in jax.tree.leaves(found[item]))
        here = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(found[item]))
        assert here < 0.4 * whole, (item, here, whole)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def test_activations_on_the_host_change_nothing():
    def loss(weights, x, remat):
        layer = lambda x, w: jnp.cos(checkpoint_name(jnp.sin(x @ w), "attention_out") @ w)
        return run_stack(layer, x, weights, remat=remat).sum()

    weights, x = jax.random.normal(jax.random.key(0), (3, 8, 8)), jnp.ones((4, 8))
    grad = lambda remat: jax.jit(jax.grad(lambda w: loss(w, x, remat)))
    offloaded = grad("offload").lower(weights).compile()
    np.testing.assert_allclose(offloaded(weights), grad("none")(weights), rtol=1e-6)
    assert "<host>" in str(jax.make_jaxpr(jax.grad(lambda w: loss(w, x, "offload")))(weights))


def test_a_platform_without_host_memory_is_one_sentence(debug, monkeypatch):
    device = SimpleNamespace(platform="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    network = SimpleNamespace(abstract={}, axes={})
    for ask, option in (
        (lambda: abstract_state(network, None, layout_of("dp"), offload=True), "config.optimizer.offload"),
        (lambda: run_stack(lambda x, w: x, 0.0, jnp.ones(2), remat="offload"), "model.remat=offload"),
    ):
        with pytest.raises(UserError, match=f"{option}: abacus devices have no pinned_host memory here, only device"):
            ask()
