"""From logical axes to shardings: for parameters, batches and activations.

with use(mesh, "fsdp"):
    params = draw(net, key, shardings(net.abstract, net.axes))
    x = constrain(x, "batch", "frames", "space", None)       # inside a model; does nothing without a mesh
"""

import math
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import rules as rules_

_current: ContextVar["Layout | None"] = ContextVar("layout", default=None)


@dataclass(frozen=True)
class Layout:
    mesh: Mesh
    rules: rules_.Rules
    state_rules: rules_.Rules | None = None  # of optimizer state and EMA where they do not lie like the parameters
    attention: str = ""  # how a sequence that is shared out attends to itself (kernels/full.py); empty: the cheapest

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

    @property
    def of_state(self) -> "Layout":
        """The layout of what the optimizer keeps."""
        return self if self.state_rules is None else Layout(self.mesh, self.state_rules)

    def axes_of(self, name: str) -> tuple[str, ...]:
        """Mesh axes wider than one that carry a logical axis."""
        return tuple(axis for axis in self.rules.get(name, ()) if self.sizes.get(axis, 1) > 1)


ATTENTION = ("heads", "gather", "ring")


def layout(mesh: Mesh, preset: str, attention: str = "") -> Layout:
    if preset not in rules_.PRESETS:
        raise UserError(f"mesh.rules={preset!r} is unknown; choose one of {', '.join(rules_.PRESETS)}")
    if attention and attention not in ATTENTION:
        raise UserError(f"mesh.attention={attention!r} is unknown; choose one of {', '.join(ATTENTION)}, or none")
    return Layout(mesh, rules_.PRESETS[preset], rules_.STATE.get(preset), attention)


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


@contextmanager
def nowhere():
    """As if there were no mesh: what is traced here is the arithmetic of one device that does it all."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def shardings(abstract, axes, where: Layout | None = None):
    """A tree of NamedShardings for a tree of abstract arrays and their logical axes."""
    where = where or current()
    assert where is not None, "shardings need a layout"
    return jax.tree.map(lambda leaf, names: where.sharding(names, leaf.shape), abstract, axes)


def draw(network, key, where=None) -> dict:
    """Random parameters, each on the devices that keep it. Without LLVM's optimizations: the code runs once."""
    plain = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(network.init, out_shardings=where, compiler_options=plain)(key)


def manual_axes() -> frozenset[str]:
    """Mesh axes over which this code is already traced for one device (inside `shard_map`)."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


HOST = "pinned_host"  # the host's memory that devices read by themselves


def need_host_memory(option: str) -> None:
    """One sentence where the platform cannot keep arrays of devices with the host."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise UserError(f"{option}: {device.platform} devices have no {HOST} memory here, only {', '.join(kinds)}")


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


def rows_of_process(where: Layout) -> tuple[int, int]:
    """(index, count): which share of the global batch this process reads. Processes that share their rows, because
    `context` or `tensor` reaches over them, read the same share."""
    parts = math.prod(where.sizes[axis] for axis in where.axes_of("batch"))
    held = where.sharding(("batch",), (parts,)).addressable_devices_indices_map((parts,)).values()
    parts_here = sorted({index[0].start or 0 for index in held if index})
    first, many = parts_here[0], len(parts_here)
    if parts_here != list(range(first, first + many)) or parts % many or first % many:
        raise UserError(
            f"mesh: the devices of this process hold parts {parts_here} of the batch, which are not in a row"
        )
    return first // many, parts // many


def place_batch(batch: dict, where: Layout) -> dict:
    """Host arrays of this process → global arrays, cut along the batch axis; every process brings its own rows."""
    _, count = rows_of_process(where)

    def place(array):
        shape = (array.shape[0] * count, *array.shape[1:])
        sharding = where.sharding(("batch", *[None] * (array.ndim - 1)), shape)
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: place(array) for name, array in batch.items()}


def put(array, where):
    """A host array that every process holds, onto its devices: each machine uploads its own part."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda part: array[part])


def to_host(array) -> np.ndarray:
    """The whole of an array, also of one that lies on several machines; then every process must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
