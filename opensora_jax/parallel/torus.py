"""Where the axes of a mesh lie on a TPU's torus.

An all-to-all takes as long as the longest side of the box that its devices form, so `context` gets the most compact box
that there is (2 x 4 chips, not a line of 8: half the time); other axes get a box, together with what lies inside it, that
touches the most links. Chips of one machine stay together, so that each process holds consecutive rows of the batch.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

Factors = tuple[int, ...]


def placed(sizes: dict[str, int], devices: Sequence) -> np.ndarray | None:
    """Devices with coordinates in the shape of the mesh, innermost axis last; None where they form no torus or the axes
    do not divide its sides."""
    grid, machine = torus_of(devices)
    if grid is None:
        return None
    # Two levels: machines of the torus, chips of a machine. Inner axes use up the chips first.
    left = [tuple(whole // part for whole, part in zip(grid.shape, machine)), machine]
    inside = (1,) * grid.ndim  # sides of the box of all axes so far
    taken = []
    for axis, size in reversed(sizes.items()):
        chips = math.gcd(size, math.prod(left[1]))
        options = [
            (box(outer, inner), outer, inner)
            for outer in factors(size // chips, left[0])
            for inner in factors(chips, left[1])
        ]
        if not options:
            return None
        sides, outer, inner = min(options, key=lambda option: _cost(axis, option[0], inside, grid.shape))
        left = [tuple(a // b for a, b in zip(*pair)) for pair in zip(left, (outer, inner))]
        inside = box(inside, sides)
        taken.insert(0, (outer, inner))
    return _arranged(grid, taken).reshape(tuple(sizes.values()))


def torus_of(devices: Sequence) -> tuple[np.ndarray | None, Factors]:
    """The devices by coordinates (cores of a chip are the last one), and the sides of one machine's box."""
    if not all(hasattr(device, "coords") for device in devices):
        return None, ()
    places = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices])
    places -= places.min(0)
    shape = tuple((places.max(0) + 1).tolist())
    here = places[[device.process_index == devices[0].process_index for device in devices]]
    machine = tuple((here.max(0) - here.min(0) + 1).tolist())
    divides = all(whole % part == 0 for whole, part in zip(shape, machine))
    if math.prod(shape) != len(devices) or math.prod(machine) != len(here) or not divides:
        return None, ()
    grid = np.empty(shape, object)
    for place, device in zip(places, devices):
        grid[tuple(place)] = device
    return grid, machine


def factors(size: int, sides: Factors) -> Iterator[Factors]:
    """Every way to cut a box of `size` out of `sides`, each of which it divides."""
    divisors = ([n for n in range(1, side + 1) if side % n == 0] for side in sides)
    return (found for found in itertools.product(*divisors) if math.prod(found) == size)


def box(a: Factors, b: Factors) -> Factors:
    return tuple(x * y for x, y in zip(a, b))


def _cost(axis: str, sides: Factors, inside: Factors, torus: Factors) -> tuple:
    whole = box(inside, sides)
    links = sum((side > 1) + (side == most >= 4) for side, most in zip(whole, torus))  # a whole side is a ring
    return (max(sides), -links) if axis == "context" else (-links, max(whole))


def _arranged(grid: np.ndarray, taken: list[tuple[Factors, Factors]]) -> np.ndarray:
    """Each side of the grid is cut into machines of every axis, then chips of every axis; axes come together again."""
    axes, dimensions = len(taken), grid.ndim
    shape = [taken[axis][level][side] for side in range(dimensions) for level in (0, 1) for axis in range(axes)]
    number = lambda side, level, axis: (side * 2 + level) * axes + axis
    order = [number(side, level, axis) for axis in range(axes) for level in (0, 1) for side in range(dimensions)]
    return grid.reshape(shape).transpose(order)
