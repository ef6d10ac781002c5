"""The train state: a plain dict {params, ema, opt, step} born sharded.

Optimizer state and EMA shard like the parameters that they follow, so memory per device falls with the mesh (ZeRO-3);
under the preset `zero` they alone are cut. Optimizer state may live in the memory of the host.
Randomness is not state: every key derives from the run's seed and the step.
"""

import jax
import jax.numpy as jnp
import optax

from opensora_jax.parallel.shard import HOST, Layout, draw, need_host_memory, shardings

State = dict


def abstract_state(network, tx: optax.GradientTransformation, layout: Layout, *, offload: bool = False) -> State:
    """Shapes, dtypes and shardings of the whole state; touches no memory. offload: moments are kept by the host."""
    if offload:
        need_host_memory("config.optimizer.offload")
    describe = lambda where: jax.tree.map(_struct, network.abstract, shardings(network.abstract, network.axes, where))
    params, kept = describe(layout), describe(layout.of_state)
    everywhere = layout.replicated()
    moments = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST) if offload else leaf.sharding, kept)
    opt = optax.tree_map_params(
        tx,
        _struct,
        jax.eval_shape(tx.init, network.abstract),
        moments,
        transform_non_params=lambda leaf: _struct(leaf, everywhere),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    ema = jax.tree.map(lambda leaf: _struct(leaf, leaf.sharding, jnp.float32), kept)
    return {"params": params, "ema": ema, "opt": opt, "step": _struct(jax.ShapeDtypeStruct((), jnp.int32), everywhere)}


def init_state(network, tx: optax.GradientTransformation, abstract: State, key, params=None) -> State:
    """A fresh state: parameters drawn in place on the mesh, or the given ones."""

    def fresh(params):
        ema = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return {"params": params, "ema": ema, "opt": tx.init(params), "step": jnp.zeros((), jnp.int32)}

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if params is None:
        return jax.jit(fresh, out_shardings=where, donate_argnums=0)(draw(network, key, where["params"]))
    return jax.jit(fresh, out_shardings=where)(params)


def _struct(leaf, sharding, dtype=None):
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)
