"""Arithmetic of a traced program, from its jaxpr: every matmul and convolution as often as it runs, kernels included.

    work = count(jitted.trace(*shapes).jaxpr)      # FLOPs of all devices; multiply-add = 2
    flops = forward_flops(denoiser, shape)         # of one forward pass of a network, the same on every mesh

A loop of the trace is counted by its length, a kernel by its grid, a per-device region by its devices; softmax, norms and
other elementwise arithmetic are not counted, as everywhere in this project.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from opensora_jax.common.shapes import LatentShape
from opensora_jax.config import Part
from opensora_jax.kernels import spec
from opensora_jax.parallel import shard


@dataclass(frozen=True)
class Kernel:
    """A Pallas call: how often a device runs it in a step, and one call's matmuls and traffic."""

    name: str
    calls: int
    flops: float
    bytes: float
    innermost: int = 1  # the last dimension of the grid
    equation: Any = field(compare=False, repr=False, default=None)


@dataclass
class Work:
    flops: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    unknown_loops: int = 0  # `while` loops without a known length, counted once

    def steps_a_row(self) -> dict[str, int]:
        """Of kernels with work for one step of a row alone, the fewest steps of a row."""
        found = {}
        for kernel in self.kernels:
            if kernel.name in spec.ONCE_A_ROW:
                found[kernel.name] = min(kernel.innermost, found.get(kernel.name, kernel.innermost))
        return found


@functools.lru_cache(maxsize=64)
def forward_flops(denoiser: Part, shape: LatentShape) -> float:
    """With plain attention; a second or two for a shape that was not asked for before."""
    given = dict(denoiser.module.inputs(denoiser.config, shape))
    x, t = given.pop("x"), given.pop("t")
    network = denoiser.network()
    run = lambda params, x, t, given: network(params, x, t, **given)
    with spec.target("cpu"), shard.nowhere():
        return count(jax.make_jaxpr(run)(network.abstract, x, t, given)).flops


def count(jaxpr) -> Work:
    work = Work()
    _count(getattr(jaxpr, "jaxpr", jaxpr), 1, 1, work)
    return work


def _count(jaxpr, times: int, devices: int, work: Work) -> None:
    """times: how often one device runs this; devices: how many do."""
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            work.flops += times * devices * _dot(eqn)
        elif name == "conv_general_dilated":
            work.flops += times * devices * _convolution(eqn)
        elif name == "scan":
            _count(params["jaxpr"].jaxpr, times * params["length"], devices, work)
        elif name == "cond":
            _count_dearest(params["branches"], times, devices, work)
        elif name == "pallas_call":
            _count_kernel(eqn, times, devices, work)
        elif name == "shard_map":
            manual = params.get("manual_axes") or params["mesh"].axis_names
            spread = math.prod(params["mesh"].shape[axis] for axis in manual)
            _count(_bare(params["jaxpr"]), times, devices * spread, work)
        else:
            work.unknown_loops += name == "while"
            for inner in inner_jaxprs(params):
                _count(inner, times, devices, work)


def _count_dearest(branches, times, devices, work: Work) -> None:
    found = []
    for branch in branches:
        found.append(Work())
        _count(branch.jaxpr, times, devices, found[-1])
    dearest = max(found, key=lambda w: w.flops)
    work.flops += dearest.flops
    work.kernels += dearest.kernels


def _count_kernel(eqn, times, devices, work: Work) -> None:
    grid = [n for n in eqn.params["grid_mapping"].grid if isinstance(n, int)]
    inside = Work()
    _count(_bare(eqn.params["jaxpr"]), math.prod(grid), 1, inside)
    arrays = {id(v): v.aval for v in (*eqn.invars, *eqn.outvars)}.values()  # q, k and v may be blocks of one array
    traffic = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    info = eqn.params.get("name_and_src_info")
    name = getattr(info, "name", None) or eqn.params.get("name") or "kernel"
    work.kernels.append(Kernel(str(name), times, inside.flops, float(traffic), grid[-1] if grid else 1, eqn))
    work.flops += times * devices * inside.flops


def _dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _convolution(eqn) -> float:
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / max(outputs, 1)


def _bare(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def inner_jaxprs(params: dict):
    """The traces that an equation carries."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield _bare(item)
