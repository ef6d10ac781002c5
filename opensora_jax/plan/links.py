"""How long an exchange takes on a topology: bytes, link rates and how a group of devices lies on the links.

A group of a TPU mesh spans a box of the torus. A side that is the whole torus closes into a ring and carries twice
what a line does; groups that lie in each other's gaps share the links. GPUs of one machine speak over NVLink, those of several over a network card each. Start-up times are
not counted. A model, not a measurement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from opensora_jax.plan.chips import Topology
from opensora_jax.plan.hlo import Collective


class Side(NamedTuple):
    """Of the box that a group spans: its devices along it, does it close into a ring, groups that share the links."""

    length: int
    ring: bool
    sharing: float = 1.0

    @property
    def ways(self) -> float:
        """Links that one device sends over at once."""
        return (2 if self.ring else 1) / self.sharing


@dataclass(frozen=True)
class Span:
    """Where a group lies: the sides of its box; for GPUs machines and GPUs in each."""

    sides: tuple[Side, ...] = ()
    machines: int = 1
    local: int = 1


@dataclass(frozen=True)
class Links:
    topology: Topology
    places: np.ndarray  # coordinates of each device, in the shape of the mesh
    axes: tuple[str, ...]

    @classmethod
    def of(cls, topology: Topology, sizes: dict[str, int], devices=None) -> "Links":
        """devices: of the mesh, with coordinates; GPUs lie machine after machine in the mesh's order."""
        shape = tuple(sizes.values())
        if devices is None:
            index = np.arange(math.prod(shape))
            places = np.stack([index % topology.sides[0], index // topology.sides[0]], -1)
        else:
            places = np.array([device.coords for device in np.ravel(devices)])
        return cls(topology, places.reshape(*shape, -1), tuple(sizes))

    def span(self, axes: Sequence[str]) -> Span:
        index = tuple(slice(None) if axis in axes else 0 for axis in self.axes)
        places = self.places[index].reshape(-1, self.places.shape[-1])
        if not self.topology.chip.is_tpu:
            machines = len(set(places[:, 1].tolist()))
            return Span(machines=machines, local=max(1, len(places) // machines))
        sides = []
        for found, whole in zip(places.T, self.topology.sides):
            length = len(set(found.tolist()))
            if length > 1:
                sharing = (found.max() - found.min()) / (length - 1)  # the distance of neighbours
                ring = round(length * sharing) == whole and whole % self.topology.chip.wraps_at == 0
                sides.append(Side(length, ring, sharing))
        return Span(tuple(sides))

    def seconds(self, collective: Collective) -> float:
        """Of all its runs in a step, one after the other."""
        span, whole = self.span(collective.axes), collective.bytes
        once = (
            self._torus(collective, span, whole) if self.topology.chip.is_tpu else self._gpus(collective, span, whole)
        )
        return collective.count * once

    def _torus(self, collective: Collective, span: Span, whole: float) -> float:
        link = self.topology.chip.link
        if not span.sides:  # cores of one chip
            return collective.moved / collective.count / self.topology.chip.bandwidth
        if collective.kind == "collective-permute":
            return whole / link
        if (
            "all-to-all" in collective.kind
        ):  # each side at once; of a ring of a devices the busiest link carries a/8 of an operand
            return max(whole * side.length / (4 * side.ways) / link for side in span.sides)
        ways = sum(side.ways for side in span.sides)
        rate = min(ways, collective.rings or ways) * link
        share = (collective.size - 1) / collective.size
        return (2 if collective.kind == "all-reduce" else 1) * whole * share / rate

    def _gpus(self, collective: Collective, span: Span, whole: float) -> float:
        chip, size = self.topology.chip, collective.size
        across = span.machines > 1
        if collective.kind == "collective-permute":
            return whole / (chip.network if across else chip.link)
        if "all-to-all" in collective.kind:
            outside = whole * (size - span.local) / size / chip.network if across else 0.0
            return max(whole * (span.local - 1) / size / chip.link, outside)
        share = (size - 1) / size
        inside = whole * share / chip.link
        between = whole * (span.machines - 1) / span.machines / (chip.network * span.local) if across else 0.0
        return (2 if collective.kind == "all-reduce" else 1) * max(inside, between)
