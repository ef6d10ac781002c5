"""Optimizers by name: what Muon orthogonalizes, what AdamW keeps, and that a run's state takes either."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.training import optimizer
from opensora_jax.training.optimizer import OptimizerConfig


def first_update(cfg, params, grads):
    tx = optimizer.make(cfg, 10, jax.tree.map(lambda _: True, params))
    return jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(params, grads)


def test_muon_orthogonalizes_layers_and_convolutions_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shapes = {
        "blocks": {"kernel": (2, 16, 32), "bias": (2, 32)},
        "conv": {"kernel": (3, 3, 4, 8)},
        "final": {"kernel": (32, 8)},
    }
    params, grads = (jax.tree.map(lambda s: draw(*s), shapes, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(2))
    common = dict(learning_rate=0.01, eps=1e-8, grad_clip=0.0)
    muon = first_update(OptimizerConfig(name="muon", **common), params, grads)
    adamw = first_update(OptimizerConfig(name="adamw", **common), params, grads)
    for update in (*muon["blocks"]["kernel"], muon["conv"]["kernel"].reshape(-1, 8)):
        singular = np.linalg.svd(np.asarray(update), compute_uv=False)
        assert singular.max() < 1.8 * singular.min(), singular  # five iterations leave them between 0.7 and 1.2
        # the longer side's worth of directions, each with the same say, and as far as AdamW goes
        assert np.linalg.norm(singular) == pytest.approx(0.2 * 0.01 * np.sqrt(update.size), rel=0.25)
    for path in (("blocks", "bias"), ("final", "kernel")):
        np.testing.assert_array_equal(muon[path[0]][path[1]], adamw[path[0]][path[1]])


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="adamw or muon"):
        first_update(OptimizerConfig(name="sgd"), {"kernel": jnp.zeros((2, 2))}, {"kernel": jnp.zeros((2, 2))})
