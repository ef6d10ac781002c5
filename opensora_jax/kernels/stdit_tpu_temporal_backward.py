"""Backward pass of temporal mode (stdit_tpu_temporal.py): scores are recomputed, dq, dk and dv come out of one kernel.

q and k are prepared as in the forward pass (tpu_temporal.py), their gradients take their place tile by tile, and at the end
go back through norm and rotation on whole channels, where q and k are read once more as they came. With u what is
normalised, g the gradient of what comes out of the norm, w its weight and r = 1 / root mean square of a head:

    du = r w g - u (r^3 / dim) sum(w g u),    dw = sum(r g u)

the sums over a head being marks (tpu_channels.py). Rotation stands before or behind.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, tpu_channels, tpu_temporal
from opensora_jax.kernels.tpu_lanes import COLUMNS_BY_COLUMNS, LANES, ROWS_BY_ROWS, dot
from opensora_jax.kernels.tpu_temporal import FAR, Block, lanes, pack, unpack

ARRAYS = 4  # that lie in fast memory as words: q, k, v and the gradient of the result
SPILLS = 6 << 20
BACK = ("cos", "sin_back")  # the rotation's tables on the way back


def gradients(qkv, norm, rope, shown, d_out, problem):
    """(of qkv, of the norm's weights [2, C] or None)."""
    heads = problem.heads
    extras = tpu_temporal.operands(problem, qkv.dtype, norm, rope, shown)
    extras |= tpu_channels.tables_back(heads, norm, rope)
    d_qkv, *d_norm = _call(problem, qkv, extras, d_out, norm is not None)
    if not d_norm:
        return d_qkv, None
    return d_qkv, d_norm[0].sum((0, 1, 3)) * tpu_channels.scales_back(heads)[:, None]


def _call(problem, qkv, extras, d_out, normed):
    channels = problem.heads.channels
    grid = (qkv.shape[1], -(-problem.positions // problem.block))
    scratch = problem.scratch(ARRAYS)
    if normed:
        scratch.append(pltpu.VMEM((2, problem.pack, problem.padded * problem.words, LANES), jnp.float32))
    double = bytes_of(problem, normed, "cos" in extras, buffers=2) <= blocks.vmem()
    moving = {} if double else {"pipeline_mode": pl.Buffered(1)}
    out_specs, out_shape = [problem.of_program(3, **moving)], [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    if normed:
        out_specs.append(pl.BlockSpec((1, 1, 2, 8, channels), lambda i, j: (i, j, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((*grid, 2, 8, channels), jnp.float32))
    run = functools.partial(kernel, problem=problem)
    return pl.pallas_call(
        lambda qkv_ref, do_ref, refs, *rest: run(qkv_ref, do_ref, refs | {"norm": normed}, *rest),
        grid=grid,
        in_specs=[
            problem.of_program(3, **moving),
            problem.of_program(1, **moving),
            tpu_temporal.specs_of(extras, **moving),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="stdit_temporal_backward",
    )(qkv, d_out, extras)


def bytes_of(problem, normed: bool, rotated: bool, buffers: int) -> int:
    """Of fast memory: not less than the compiler asks for, up to which 120 frames with norm and rotation compile for v5p,
    and 128 do not (2026-11-29)."""
    channels = problem.heads.channels
    moving = 7 * problem.frames * problem.block * channels * problem.itemsize
    tables = 6 * 4 * channels * (problem.frames if rotated else 1)
    roots = normed * 2 * problem.pack * problem.padded * problem.words * LANES
    held = roots + sum(math.prod(x.shape) for x in problem.scratch(ARRAYS))
    return buffers * (moving + tables) + 4 * held + SPILLS


def kernel(qkv_ref, do_ref, extras, d_ref, *rest, problem):
    heads, dtype = problem.heads, d_ref.dtype
    d_norm_ref, words, turned, roots = rest if extras["norm"] else (None, *rest, None)
    block = Block(problem, extras, words, turned, dtype)
    block.prepare([qkv_ref, do_ref], roots)

    def start(index, head):
        """Logits and gradients of the weights, with the operands that they were made of."""
        q = block.operand(index, 0, head, extras["q_code"][...])
        k = block.operand(index, 1, head, extras["k_code"][0])
        do = block.operand(index, 3, head, jnp.zeros((), dtype))
        v = block.operand(index, 2, head)  # other heads' lanes meet zeros
        return dot(k, q, ROWS_BY_ROWS), dot(v, do, ROWS_BY_ROWS), q, k, do

    def soften(scores, d_weights, *operands):
        """Weights and gradients of the logits, [keys, queries]: sums over keys cross no lanes."""
        peak = scores.max(0, keepdims=True)
        weights = jnp.exp2(scores - peak)
        weights = weights * jnp.where(peak > FAR / 2, 1.0 / weights.sum(0, keepdims=True), 0.0)
        slope = weights * (d_weights - (weights * d_weights).sum(0, keepdims=True))
        return weights.astype(dtype), slope.astype(dtype), *operands

    def finish(tiles, head, weights, slope, q, k, do):
        heads.scatter(tiles[0], head, dot(slope, k, COLUMNS_BY_COLUMNS))
        heads.scatter(tiles[1], head, dot(slope, q))
        heads.scatter(tiles[2], head, dot(weights, do))

    def body(first):
        tiles = [[[None] * heads.tiles for _ in range(3)] for _ in range(problem.beside)]
        started, softened = {}, {}
        # One tile's products run beside the softmax of the tile before and the gradients of the one before that.
        for starting, between, ending in problem.stages():
            for slot, head in starting:
                started[slot, head] = start(first + slot, head)
            for item in between:
                softened[item] = soften(*started.pop(item))
            for slot, head in ending:
                finish(tiles[slot], head, *softened.pop((slot, head)))
        for slot, found in enumerate(tiles):
            for tile, x in enumerate(x for some in found for x in some):
                block.save(tile, first + slot, x)

    block.each_tile(body)
    block.each_chunk(functools.partial(block.give, d_ref, range(2 * heads.tiles, 3 * heads.tiles)))
    if d_norm_ref is not None:
        d_norm_ref[...] = jnp.zeros_like(d_norm_ref)
    block.each_chunk(functools.partial(_undo, block, qkv_ref, d_ref, d_norm_ref, roots))


def _undo(block, qkv_ref, d_ref, d_norm_ref, roots, chunk):
    """Gradients of q and k as they came. v and the gradient of the result are not needed any more."""
    problem, tiles, at = block.problem, block.heads.tiles, block.at(chunk)
    rows = at.size

    def put(which, tile, parts):
        block.write(d_ref, which * tiles + tile, chunk, pack(parts, problem.interpret))

    if d_norm_ref is None:
        for which, tile in ((which, tile) for which in range(2) for tile in range(tiles)):
            parts = block.turn(block.words[which * tiles + tile, at], BACK, which, tile, chunk)
            put(which, tile, [block.times(part, "weight", which, tile, chunk) for part in parts])
        return

    def sides(which, tile):
        """u and g; the one that is behind a rotation waits in `turned` since `products`."""
        waited = block.take_turned(which * tiles + tile, rows)
        if problem.norm_first:
            return unpack(block.words[(2 + which) * tiles + tile, at]), waited
        return waited, unpack(block.words[which * tiles + tile, at])

    def products(which, tile):
        x, d = block.read(qkv_ref, which * tiles + tile, chunk), block.words[which * tiles + tile, at]
        if problem.norm_first:
            block.words[(2 + which) * tiles + tile, at] = x
            u, g = unpack(x), block.turn(d, BACK, which, tile, chunk)
            block.put_turned(which * tiles + tile, g)
        else:
            u, g = block.turn(x, ("a", "b"), which, tile, chunk), unpack(d)
            block.put_turned(which * tiles + tile, u)
        both = [block.times(b, "weight", which, tile, chunk) * a for a, b in zip(u, g)]
        return jnp.concatenate(both).astype(block.dtype)

    sums = [block.collect(functools.partial(products, which)) for which in range(2)]
    for which in range(2):
        root = jnp.concatenate([roots[which, part, at] for part in range(problem.pack)])
        along = root * root * root * sums[which] * (1.0 / block.heads.dim)
        spreads = (block.spread(tpu_channels.split(x, block.dtype)) for x in (root, along))
        for (tile, root_of), (_, along_of) in zip(*spreads):
            parts, d_weight = [], 0.0
            for i, (u, g) in enumerate(zip(*sides(which, tile))):
                mine = slice(i * rows, (i + 1) * rows)
                g = g * root_of[mine]
                d_weight = d_weight + g * u
                du = block.times(g, "weight", which, tile, chunk) - u * along_of[mine]
                parts.append(
                    du if problem.norm_first else block.mix(du, tpu_channels.swap(du), BACK, which, tile, chunk)
                )
            put(which, tile, parts)
            d_norm_ref[0, 0, which, :, lanes(tile)] += _fresh(problem, d_weight, chunk).reshape(-1, 8, LANES).sum(0)


def _fresh(problem, x, chunk):
    """Zero in the frames that the chunk before had too."""
    if isinstance(chunk.repeated, int):
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row >= chunk.repeated * problem.words, x, 0.0)
