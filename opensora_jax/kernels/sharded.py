"""Kernels under a mesh: the compiler cannot partition them, so they run on each device's share of batch and tokens.

Samples are cut along the batch axes and what does not attend to each other along the context axis: frames in spatial
mode, positions in temporal mode, queries in plain attention (keys stay whole). Leaving and entering these layouts is
left to the compiler: between a spatial and a temporal block it becomes one all-to-all.
"""

import math

import jax

from opensora_jax.parallel import shard


def over_mesh(run, operands: dict, names: dict, out_shape, out_names):
    """run(**operands) under the current layout. `names`: logical axes of each operand (a tuple of tuples where the
    operand is a tuple of arrays); operands that are None are passed on. out_shape, out_names: of the
    result, or of each where there are several. Inside a `shard_map`, which handed over this device's share along some axes,
    only the others are left to cut."""
    where, manual = shard.current(), shard.manual_axes()
    left = {} if where is None else {axis: size for axis, size in where.sizes.items() if axis not in manual}
    if math.prod(left.values()) == 1:
        return run(**operands)
    given = {name: x for name, x in operands.items() if x is not None}
    spec_of = lambda axes, shape: where.spec(axes, shape, without=manual)
    spec = lambda axes, x: spec_of(axes, x.shape)
    specs = {
        name: tuple(map(spec, names[name], x)) if isinstance(x, tuple) else spec(names[name], x)
        for name, x in given.items()
    }
    several = isinstance(out_shape[0], tuple)
    out_specs = tuple(map(spec_of, out_names, out_shape)) if several else spec_of(out_names, out_shape)
    missing = {name: None for name in operands if name not in given}
    return jax.shard_map(
        lambda given: run(**given, **missing),
        mesh=jax.sharding.get_abstract_mesh() if manual else where.mesh,
        in_specs=(specs,),
        out_specs=out_specs,
        axis_names=set(left),
        check_vma=False,
    )(given)
