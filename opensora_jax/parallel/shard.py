"""From logical axes to shardings: for parameters, batches and activations.

with use(mesh, "fsdp"):
    params = jax.jit(net.init, out_shardings=shardings(net.abstract, net.axes))(key)
    x = constrain(x, "batch", "frames", "space", None)       # inside a model; does nothing without a mesh
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import rules as rules_

_current: ContextVar["Layout | None"] = ContextVar("layout", default=None)


@dataclass(frozen=True)
class Layout:
    mesh: Mesh
    rules: rules_.Rules

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def spec(self, names, shape, without=()) -> PartitionSpec:
        """Where an array lies, as far as mesh axes other than `without` are concerned."""
        sizes = {axis: size for axis, size in self.sizes.items() if axis not in without}
        return rules_.spec(names, shape, self.rules, sizes)

    def sharding(self, names, shape) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(names, shape))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def axes_of(self, name: str) -> tuple[str, ...]:
        """Mesh axes wider than one that carry a logical axis."""
        return tuple(axis for axis in self.rules.get(name, ()) if self.sizes.get(axis, 1) > 1)


def layout(mesh: Mesh, preset: str) -> Layout:
    if preset not in rules_.PRESETS:
        raise UserError(f"mesh.rules={preset!r} is unknown; choose one of {', '.join(rules_.PRESETS)}")
    return Layout(mesh, rules_.PRESETS[preset])


def current() -> Layout | None:
    return _current.get()


@contextmanager
def use(where: Layout):
    token = _current.set(where)
    try:
        with jax.set_mesh(where.mesh):
            yield where
    finally:
        _current.reset(token)


def shardings(abstract, axes, where: Layout | None = None):
    """A tree of NamedShardings for a tree of abstract arrays and their logical axes."""
    where = where or current()
    assert where is not None, "shardings need a layout"
    return jax.tree.map(lambda leaf, names: where.sharding(names, leaf.shape), abstract, axes)


def manual_axes() -> frozenset[str]:
    """Mesh axes over which this code is already traced for one device (inside `shard_map`)."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def constrain(x, *names: str | None):
    """Pins an activation; outside a layout (a laptop, a converter) it is the identity, and so are manual axes."""
    where = current()
    if where is None:
        return x
    manual = manual_axes()
    if not manual:
        return jax.lax.with_sharding_constraint(x, where.sharding(names, x.shape))
    pinned = where.spec(names, x.shape, without=manual)
    return jax.lax.with_sharding_constraint(x, pinned) if any(pinned) else x


def place_batch(batch: dict, where: Layout) -> dict:
    """Host arrays of this process → global arrays, cut along the batch axis; every process brings its own rows."""

    def place(array):
        rows = array.shape[0] * jax.process_count()
        sharding = where.sharding(("batch", *[None] * (array.ndim - 1)), (rows, *array.shape[1:]))
        return jax.make_array_from_process_local_data(sharding, array)

    return {name: place(array) for name, array in batch.items()}
