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
from opensora_jax.kernels.tpu_lanes import (
    COLUMNS_BY_COLUMNS,
    LANES,
    LOG2E,
    ROWS_BY_ROWS,
    dot,
    hold,
    lanes_of,
    once,
    words_of,
)
from opensora_jax.kernels.tpu_temporal import FAR, FORTH, Block

ARRAYS = 4  # that lie in fast memory as words: q, k, v and the gradient of the result
TOGETHER = 16  # heads; of long rows one by one, which takes 2 to 4% less time than four (v5e, v6e, 2026-12-01)
AHEAD = 6  # tiles of lanes for which norms lie spread over their heads
SPILLS = 2 << 20
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
        scratch_shapes=_scratch(problem, normed),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="stdit_temporal_backward",
    )(qkv, d_out, extras)


def bytes_of(problem, normed: bool, rotated: bool, buffers: int) -> int:
    """Of fast memory: not less than the compiler asks for, which for v5p, with norm and rotation, is 54 MiB of 60 frames twice
    (57 here) and 53 of 120 once (58; 2026-12-01)."""
    channels = problem.heads.channels
    moving = 7 * problem.frames * problem.block * channels * problem.itemsize
    tables = 6 * 4 * channels * (problem.frames if rotated else 1)
    shapes = [x.shape for x in jax.tree.leaves(_scratch(problem, normed))]
    held = sum(math.prod(shape[:-1]) * -(-shape[-1] // LANES) * LANES for shape in shapes)
    return buffers * (moving + tables) + 4 * held + SPILLS


def _scratch(problem, normed: bool) -> list:
    rows, words = problem.rows, problem.rows // problem.pack
    roots = [pltpu.VMEM((2, problem.padded * problem.block, LANES), jnp.float32)]
    whole = not problem.halves
    held = functools.partial(problem.held, 0 if problem.long and problem.halves else problem.items)
    return [
        *problem.scratch(ARRAYS),
        held(3, words, LANES, dtype=problem.word),  # q, k and the gradient of the result
        held(1, LANES // problem.pack, rows, dtype=problem.word) * whole,  # the latter transposed
        held(2, rows, rows, dtype=jnp.float32),  # scores, later weights; gradients of the weights
        held(2, words, rows, dtype=problem.word) * whole,  # weights and gradients of the scores
        *normed * roots,
    ]


def kernel(qkv_ref, do_ref, extras, d_ref, *rest, problem):
    heads, dtype = problem.heads, d_ref.dtype
    d_norm_ref, words, waiting, sides, turned, products, factors, roots = (
        rest if extras["norm"] else (None, *rest, None)
    )
    block = Block(problem, extras, words, waiting, dtype)
    block.prepare([qkv_ref, do_ref], roots)
    scales = heads.dim**-0.5, 1.0 / LOG2E  # of the gradients of q and k

    def body(first):
        q_code, k_code = extras["q_code"][...], extras["k_code"][0]
        nothing = jnp.zeros((8, LANES), words.dtype)
        found = [[[None] * heads.count for _ in range(3)] for _ in range(problem.beside)]
        started, softened = {}, {}
        # Some heads' products run beside the softmax of those before and the gradients of the ones before those.
        for starting, between, ending in problem.stages(1 if problem.long else TOGETHER):
            for slot, head in starting:
                q = block.operand(first + slot, 0, head, q_code)
                k = block.operand(first + slot, 1, head, k_code)
                do = block.operand(first + slot, 3, head, nothing)
                v = block.operand(first + slot, 2, head)  # other heads' lanes meet zeros
                item = slot * heads.count + head
                operands = block.hold(sides, item, q, k, do)
                # Loads run ahead of the products that they are for: what is read back at once waits in memory, not in registers.
                q, k, do = (q, k, do) if block.halves else operands()
                (do_turned,) = block.hold(turned, item, do.T)()
                scores = dot(k, q, ROWS_BY_ROWS)
                held = block.hold(products, item, scores, dot(v, do_turned))
                started[slot, head] = scores.max(0, keepdims=True), held, operands
            for slot, head in between:
                # [keys, queries]: sums over keys cross no lanes. Both at once, of what is not divided yet.
                peak, held, operands = started.pop((slot, head))
                scores, d_weights = held()
                weights, item = jnp.exp2(scores - peak), slot * heads.count + head
                again = block.hold(products, item, weights)  # until their sum is known
                share = jnp.where(peak > FAR / 2, 1.0 / weights.sum(0, keepdims=True), 0.0)
                mean = share * (weights * d_weights).sum(0, keepdims=True)
                (weights,), (_, d_weights) = again(), held()
                results = weights * share, weights * ((d_weights - mean) * share)
                softened[slot, head] = block.hold(factors, item, *(x.astype(dtype) for x in results)), operands
            for slot, head in ending:
                weights, slope, q, k, do = (x for held in softened.pop((slot, head)) for x in held())
                gradients = dot(slope, k, COLUMNS_BY_COLUMNS), dot(slope, q), dot(weights, do)
                for array, x in enumerate(gradients):
                    found[slot][array][head] = x * scales[array] if block.plain and array < 2 else x
        for slot, arrays in enumerate(found):
            for array, results in enumerate(arrays):
                block.save(array, first + slot, results)

    block.each_tile(body)
    block.each_chunk(
        functools.partial(block.give, d_ref, range(0 if block.plain else 2 * heads.tiles, 3 * heads.tiles))
    )
    if d_norm_ref is not None:
        d_norm_ref[...] = jnp.zeros_like(d_norm_ref)
    if not block.plain:
        block.each_chunk(functools.partial(_undo, block, qkv_ref, d_ref, d_norm_ref, roots))


def _undo(block, qkv_ref, d_ref, d_norm_ref, roots, chunk):
    """Gradients of q and k as they came. v and the gradient of the result are not needed any more."""
    problem, tiles, rows = block.problem, block.heads.tiles, block.rows_at(chunk)

    def put(which, tile, x):
        block.write(d_ref, which * tiles + tile, chunk, words_of(x.astype(block.dtype)))

    read = functools.partial(block.reader, chunk=chunk)
    if d_norm_ref is None:
        for which in range(2):
            turned = block.turned(read(which), BACK, which, chunk)
            for tile in range(tiles):
                put(which, tile, block.times(turned(tile), "weight", which, tile, chunk))
        return

    for which, tile in ((which, tile) for which in range(2) for tile in range(tiles)):
        block.fetch(qkv_ref, which * tiles + tile, chunk, (2 + which) * tiles + tile)
    every_u, every_g = ([read(array + which) for which in range(2)] for array in (2, 0))
    # Which of the two is behind a rotation is turned, and waits.
    source, names = (every_g, BACK) if problem.norm_first else (every_u, FORTH)
    turned = [block.turned(source[which], names, which, chunk) for which in range(2)]
    wait = lambda which, tile, x: hold(block.waiting[which], (tile, slice(rows.size)), x, block.zero)
    waiting, done = {}, []

    def sides(which, tile, waited):
        found = (every_u[which](tile), waited) if problem.norm_first else (waited, every_g[which](tile))
        return (x.astype(jnp.float32) for x in found)

    def products(which, tile):
        """w g u."""
        waiting[which, tile] = wait(which, tile, turned[which](tile))
        u, g = sides(which, tile, waiting[which, tile]())
        return (block.times(g, "weight", which, tile, chunk) * u).astype(block.dtype)

    sums = [block.collect(functools.partial(products, which)) for which in range(2)]
    for which in range(2):
        root = roots[which, rows]
        along = root * root * root * sums[which] * (1.0 / block.heads.dim)
        root_of, along_of = (block.spread(x, lambda: once(done, AHEAD, block.zero)) for x in (root, along))
        for tile in range(tiles):
            u, g = sides(which, tile, waiting[which, tile]())
            g = g * root_of(tile)
            du = block.times(g, "weight", which, tile, chunk) - u * along_of(tile)
            if not problem.norm_first:
                du = wait(which, tile, du)()
                du = block.mix(du, tpu_channels.swap(du), BACK, which, tile, chunk)
            put(which, tile, du)
            done.append(du)
            d_norm_ref[0, 0, which, :, lanes_of(tile)] += _fresh(problem, g * u, chunk).reshape(-1, 8, LANES).sum(0)


def _fresh(problem, x, chunk):
    """Zero in the frames that the chunk before had too."""
    if isinstance(chunk.repeated, int):
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row >= chunk.repeated * problem.block, x, 0.0)
