"""How networks declare parameters, and how they become plain trees.

NNX declares names, dtypes and logical axes; everything after is plain JAX on nested dicts of arrays:

    net = Network.of(lambda rngs: build(cfg, rngs=rngs))    # abstract: no memory is touched
    params = net.init(key)                                  # {"blocks": {"attn": {"qkv": {"kernel": ...}}}}
    y = net(params, x, t)                                   # differentiable, jittable, scannable
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax
import jax
from flax import nnx

# Logical names are stored on parameters and resolved by parallel/; flax must not demand a mesh when one is declared.
flax.config.update("flax_always_shard_variable", False)

Params = dict[str, Any]


class Fixed(nnx.Param):
    """A parameter of the checkpoint that is never trained (rope.freqs)."""


class Buffer(nnx.Param):
    """A tensor of the checkpoint that its authors do not count as a parameter (null captions, latent statistics)."""


def partition(init: Callable, *axes: str | None) -> Callable:
    """Attaches logical axis names (parallel/rules.py lists them) to an initialiser."""
    return nnx.with_partitioning(init, axes)


@dataclass(frozen=True, eq=False)
class Network:
    """A model as a pure function of its parameters."""

    graphdef: Any
    abstract: Params  # ShapeDtypeStruct leaves
    axes: Params  # logical axis names, one tuple a leaf; None where every axis is replicated
    kinds: Params  # Param, Fixed or Buffer, one a leaf
    build: Callable[[nnx.Rngs], nnx.Module]

    @classmethod
    def of(cls, build: Callable[[nnx.Rngs], nnx.Module]) -> "Network":
        found = {}

        def states():
            found["graphdef"], state = nnx.split(build(nnx.Rngs(0)))
            return state

        state = jax.eval_shape(states)  # nnx.eval_shape would look for the logical names on a mesh that is in use
        graphdef = found["graphdef"]
        is_variable = lambda x: isinstance(x, nnx.Variable)
        describe = lambda f: nnx.to_pure_dict(
            jax.tree.map(lambda v: v.replace(_Leaf(f(v))), state, is_leaf=is_variable)
        )
        unbox = lambda tree: jax.tree.map(lambda x: x.value, tree, is_leaf=lambda x: isinstance(x, _Leaf))
        axes = lambda v: v.get_metadata().get("out_sharding") or (None,) * len(v.shape)
        return cls(
            graphdef,
            nnx.to_pure_dict(state),
            unbox(describe(axes)),
            unbox(describe(type)),
            build,
        )

    def init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key))))

    def part(self, name: str) -> "Network":
        """Shapes, axes and kinds of one child; it cannot be called by itself."""
        return replace(self, abstract=self.abstract[name], axes=self.axes[name], kinds=self.kinds[name])

    def module(self, params: Params) -> Any:
        """The module itself, for methods other than the call (`encode`, `decode`)."""
        return nnx.merge(self.graphdef, params)

    def __call__(self, params: Params, *args, method: str | None = None, **kwargs):
        module = self.module(params)
        return (getattr(module, method) if method else module)(*args, **kwargs)

    def mask(self, *kinds: type) -> Params:
        """A tree of booleans: is the leaf exactly of one of these kinds?"""
        return jax.tree.map(lambda kind: kind in kinds, self.kinds)

    @property
    def trainable(self) -> Params:
        return self.mask(nnx.Param)

    def count(self, *kinds: type) -> int:
        """Number of scalars; by default what a manifest counts: trained and fixed parameters, no buffers."""
        chosen = self.mask(*(kinds or (nnx.Param, Fixed)))
        sizes = jax.tree.map(lambda leaf, yes: leaf.size if yes else 0, self.abstract, chosen)
        return sum(jax.tree.leaves(sizes))


class _Leaf:
    """Keeps a tuple or a type from being flattened while it stands for a variable."""

    def __init__(self, value):
        self.value = value
