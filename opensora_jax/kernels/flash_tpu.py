"""Flash attention on TPUs: any length, heads of up to 128, keys beyond a sample's length or under its mask hidden.

The kernels take [B, L, N*128]: a head is one tile of lanes, picked by the block index. Heads of 128 lie like that. Smaller
ones are moved there and back by kernels of their own, each to the lanes that it has modulo 128 (tpu_lanes.py): selects at
the memory's speed, where XLA's split and pad takes seven times as long. The lanes left over carry what else would cost a pass
over the scores: a one in v collects the sum of the weights, a large negative number in k hides a key, and rows that fill up
the last block are hidden keys.

Forward: grid (sample, head, queries, keys) with a running maximum; a block of queries goes in parts, the products of one
beside the softmax of the one before. Backward: grid (sample, head, keys, queries) over transposed scores [keys, queries],
where the row statistics lie along lanes as they are stored ([B, N, 1, T]); dk and dv gather over the queries of a block of
keys, dq of all queries over the blocks of keys, all in fast memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks
from opensora_jax.kernels.tpu_lanes import (
    COLUMNS_BY_COLUMNS,
    HIDE,
    LANES,
    LOG2E,
    ROWS_BY_ROWS,
    TINY,
    Heads,
    at_lane,
    dot,
)

BLIND = -1e30
PART = 256  # queries of a forward block whose scores are at hand together
MOST_QUERIES = 1 << 15  # of one backward kernel, which holds their gradients in float32


class Problem(NamedTuple):
    """The static part of a call."""

    heads: Heads
    queries: int
    keys: int
    forward: tuple[int, int]  # queries and keys at once
    backward: tuple[int, int]
    scale: float
    interpret: bool

    @property
    def spare(self) -> bool:
        """Do heads leave lanes to spare?"""
        return self.heads.dim < LANES


def attend(q, k, v, lengths, shown=None, *, heads: Heads, scale, interpret):
    """[B, T, N*H] over [B, S, N*H]. lengths: [B] int32, keys beyond are hidden. shown: [B, S] bool, heads of 128 have none."""
    sizes = lambda stage: blocks.find("flash_tpu", stage, heads.dim, k.shape[1])
    fit = lambda stage: tuple(even_tiles(x.shape[1], most) for x, most in zip((q, k), sizes(stage)))
    problem = Problem(heads, q.shape[1], k.shape[1], fit("forward"), fit("backward"), scale, interpret)
    return _attend(q, k, v, lengths, shown, problem)


def even_tiles(length: int, most: int) -> int:
    """The smallest multiple of 128 that covers `length` in as few blocks as `most` would."""
    count = -(-length // most)
    return -(-length // (count * LANES)) * LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, lengths, shown, problem):
    return _forward(q, k, v, lengths, shown, problem)[0]


def _attend_forward(q, k, v, lengths, shown, problem):
    out, lse = _forward(q, k, v, lengths, shown, problem)
    return out, (q, k, v, lengths, shown, out, lse)


def _attend_backward(problem, residuals, d_out):
    q, k, v, lengths, shown, out, lse = residuals
    heads, queries, keys = problem.heads, problem.queries, problem.keys
    of_head = np.repeat(np.eye(heads.count, dtype=np.float32), heads.dim, axis=0)  # [N*H, N]
    delta = dot(d_out.astype(jnp.float32) * out.astype(jnp.float32), jnp.asarray(of_head), ((2,), (0,)))
    delta = delta.swapaxes(1, 2)[:, :, None]
    q, k, v = _in_tiles(q, k, v, lengths, shown, problem, problem.backward)
    if problem.spare:
        d_out = _spread(d_out, q.shape[1], (0.0, 0.0), problem=problem, lengths=lengths)
    more = ((0, 0), (0, 0), (0, 0), (0, q.shape[1] - queries))
    rows = (q, d_out, jnp.pad(lse, more), jnp.pad(delta, more))
    run = functools.partial(_backward, k=k, v=v, lengths=lengths, problem=problem)
    dq, dk, dv = run(*rows) if queries <= MOST_QUERIES else _in_runs(run, rows, (k, v), problem.backward[0])
    if problem.spare:
        dq, dk, dv = (_merge(x, length, problem) for x, length in ((dq, queries), (dk, keys), (dv, keys)))
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_tiles(q, k, v, lengths, shown, problem, sizes):
    """Operands as the kernels take them; q scaled, for logits to the base 2."""
    factor = problem.scale * LOG2E
    if not problem.spare:
        return (q.astype(jnp.float32) * factor).astype(q.dtype), k, v
    rows_q, rows = (-(-x.shape[1] // block) * block for x, block in zip((q, k), sizes))
    spread = functools.partial(_spread, problem=problem, lengths=lengths)
    if shown is not None:
        shown = jnp.pad(shown, ((0, 0), (0, rows - problem.keys)))[:, :, None].astype(jnp.float32)
        shown = jnp.broadcast_to(shown, (*shown.shape[:2], LANES))
    return (
        spread(q, rows_q, (1.0, 1.0), factor=factor),
        spread(k, rows, (0.0, HIDE), shown=shown),
        spread(v, rows, (1.0, 0.0), shown=shown),
    )


def _spread(x, rows: int, spare, *, problem, lengths, shown=None, factor=1.0):
    """[B, rows, N*128] from [B, L, N*H]: each head in its lanes times `factor`, zeros elsewhere and in rows beyond L, but
    for one foreign lane of each head with `spare`: numbers for rows that are seen and for those that are not."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))
    block = math.gcd(rows, 512)
    at = lambda width: pl.BlockSpec((1, block, width), lambda b, i: (b, i, 0))
    inside = pl.BlockSpec((1, block, x.shape[2]), lambda b, i: (b, jnp.minimum(i, (x.shape[1] - 1) // block), 0))
    masks = [] if shown is None else [shown]
    kernel = functools.partial(_spread_kernel, heads=problem.heads, length=x.shape[1], spare=spare, factor=factor)
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0], rows // block),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), inside, [at(LANES) for _ in masks]],
        out_specs=at(problem.heads.count * LANES),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], rows, problem.heads.count * LANES), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=problem.interpret,
        name="flash_tpu_spread",
    )(lengths, x, masks)


def _spread_kernel(lengths_ref, x_ref, masks, o_ref, *, heads, length, spare, factor):
    block = x_ref.shape[1]
    row = pl.program_id(1) * block + jax.lax.broadcasted_iota(jnp.int32, (block, LANES), 0)
    seen = row < jnp.minimum(lengths_ref[pl.program_id(0)], length)
    for ref in masks:
        seen &= ref[0] > 0
    read = lambda tile: x_ref[0, :, tile * LANES : (tile + 1) * LANES]
    for head in range(heads.count):
        x = jnp.where(heads.own(head, block) & (row < length), heads.gather(read, head).astype(jnp.float32), 0.0)
        x = at_lane(x * factor, heads.spare(head), jnp.where(seen, *spare))
        o_ref[0, :, head * LANES : (head + 1) * LANES] = x.astype(o_ref.dtype)


def _merge(x, length: int, problem):
    """[B, L, N*H] from the heads' own lanes in [B, rows, N*128]."""
    heads, block = problem.heads, math.gcd(x.shape[1], 512)
    channels = -(-heads.channels // LANES) * LANES
    at = lambda width: pl.BlockSpec((1, block, width), lambda b, i: (b, i, 0))
    merged = pl.pallas_call(
        functools.partial(_merge_kernel, heads=heads),
        grid=(x.shape[0], -(-length // block)),
        in_specs=[at(x.shape[2])],
        out_specs=at(channels),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], length, channels), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=problem.interpret,
        name="flash_tpu_merge",
    )(x)
    return merged[:, :, : heads.channels]


def _merge_kernel(x_ref, o_ref, *, heads):
    tiles = [None] * (o_ref.shape[2] // LANES)
    for head in range(heads.count):
        heads.scatter(tiles, head, x_ref[0, :, head * LANES : (head + 1) * LANES])
    for tile, x in enumerate(tiles):
        o_ref[0, :, tile * LANES : (tile + 1) * LANES] = x


def _forward(q, k, v, lengths, shown, problem):
    """The result, and the logarithm (to the base 2) of each query's sum of weights, [B, N, 1, T]."""
    queries = problem.queries
    q, k, v = _in_tiles(q, k, v, lengths, shown, problem, problem.forward)
    block_q, block_k = problem.forward
    query = pl.BlockSpec((1, block_q, LANES), lambda b, n, i, j: (b, i, n))
    key = pl.BlockSpec((1, block_k, LANES), lambda b, n, i, j: (b, j, n))
    row = pl.BlockSpec((1, 1, 1, block_q), lambda b, n, i, j: (b, n, 0, i))
    stat = pltpu.VMEM((block_q, LANES), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem),
        grid=(q.shape[0], problem.heads.count, -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), query, key, key],
        out_specs=[query, row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], problem.heads.count, 1, q.shape[1]), jnp.float32),
        ],
        scratch_shapes=[stat, stat] if problem.spare else [stat, stat, stat],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="flash_tpu",
    )(lengths, q, k, v)
    return _merge(out, queries, problem) if problem.spare else out, lse[..., :queries]


def _in_runs(run, rows, keyed, block: int):
    """Queries in runs of MOST_QUERIES, the gradients of keys and values summed over them."""
    axes = (1, 1, 3, 3)
    length, size = rows[0].shape[1], MOST_QUERIES // block * block
    count = -(-length // size)

    def split(x, axis):
        x = jnp.pad(x, [(0, (count * size - length) * (i == axis)) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    def one(totals, some):
        dq, *found = run(*some)
        return [total + d for total, d in zip(totals, found)], dq

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in keyed]
    totals, dq = jax.lax.scan(one, zeros, tuple(map(split, rows, axes)))
    dq = jnp.moveaxis(dq, 0, 1).reshape(rows[0].shape[0], count * size, -1)[:, :length]
    return dq, *(total.astype(x.dtype) for total, x in zip(totals, keyed))


def _backward(q, d_out, lse, delta, *, k, v, lengths, problem):
    block_q, block_k = problem.backward
    steps_q, steps_k = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    query = pl.BlockSpec((1, block_q, LANES), lambda b, n, i, j: (b, j, n))
    key = pl.BlockSpec((1, block_k, LANES), lambda b, n, i, j: (b, i, n))
    row = pl.BlockSpec((1, 1, 1, block_q), lambda b, n, i, j: (b, n, 0, j))
    # Complete with the last keys: until then its first block stays, unwritten.
    complete = pl.BlockSpec((1, block_q, LANES), lambda b, n, i, j: (b, jnp.where(i == steps_k - 1, j, 0), n))
    total = lambda rows: pltpu.VMEM((rows, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, problem=problem, queries=q.shape[1]),
        grid=(q.shape[0], problem.heads.count, steps_k, steps_q),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), query, key, key, query, row, row],
        out_specs=[complete, key, key],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[total(steps_q * block_q), total(block_k), total(block_k)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="flash_tpu_backward",
    )(lengths, q, k, v, d_out, lse, delta)


def _rows(ref, first, size: int):
    """A block [rows, 128] with zeros beyond the end of its array."""
    x = ref[0]
    if size % x.shape[0] == 0:
        return x
    row = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < size, x, jnp.zeros((), x.dtype))


def _forward_kernel(lengths_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, peak_ref, sum_ref, *total_ref, problem):
    step = pl.program_id(3)
    block_q, block_k = problem.forward
    first = step * block_k
    length = jnp.minimum(lengths_ref[pl.program_id(0)], problem.keys)
    spare = jax.lax.rem((pl.program_id(1) + 1) * problem.heads.dim, LANES)  # as Heads.spare

    @pl.when(step == 0)
    def _start():
        peak_ref[...] = jnp.full_like(peak_ref, BLIND)
        for ref in (sum_ref, *total_ref):
            ref[...] = jnp.zeros_like(ref)

    def softmax(at, scores):
        """Weights, and what earlier sums are worth beside them."""
        if not problem.spare:
            column = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(column < length, scores, BLIND)
        before = peak_ref[at]
        peak = jnp.maximum(before, scores.max(-1, keepdims=True))
        peak_ref[at] = peak
        weights, fade = jnp.exp2(scores - peak[:, :1]), jnp.exp2(before - peak)
        for ref in total_ref:
            ref[at] = ref[at] * fade + weights.sum(-1, keepdims=True)
        return weights.astype(q_ref.dtype), fade

    @pl.when(first < length)
    def _accumulate():
        v = v_ref[0] if problem.spare else _rows(v_ref, first, problem.keys)
        parts = [slice(start, min(start + PART, block_q)) for start in range(0, block_q, PART)]
        scores, weights = {}, {}
        for starting in range(len(parts) + 2):
            between, ending = starting - 1, starting - 2
            if starting < len(parts):
                scores[starting] = dot(q_ref[0, parts[starting]], k_ref[0], ROWS_BY_ROWS)
            if between in scores:
                weights[between] = softmax(parts[between], scores.pop(between))
            if ending in weights:
                at, (w, fade) = parts[ending], weights.pop(ending)
                sum_ref[at] = sum_ref[at] * fade + dot(w, v)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        out, total = sum_ref[...], total_ref[0][...] if total_ref else _in_lane(sum_ref[...], spare)
        o_ref[0] = jnp.where(total > 0, out / jnp.maximum(total, TINY), 0.0).astype(o_ref.dtype)
        lse = jnp.where(total > 0, peak_ref[...] + jnp.log2(jnp.maximum(total, TINY)), -BLIND)
        lse_ref[0, 0] = lse.T[:1]


def _in_lane(x, lane):
    """[rows, 1]."""
    at = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(at == lane, x, 0.0).sum(-1, keepdims=True)


def _backward_kernel(lengths_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest, problem, queries):
    dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = rest
    block_q, block_k = problem.backward
    first_q, first_k = pl.program_id(3) * block_q, pl.program_id(2) * block_k
    length = jnp.minimum(lengths_ref[pl.program_id(0)], problem.keys)
    at = pl.ds(pl.multiple_of(first_q, LANES), block_q)

    @pl.when(pl.program_id(2) == 0)
    def _start_queries():
        dq_sum[at] = jnp.zeros((block_q, LANES), jnp.float32)

    @pl.when(pl.program_id(3) == 0)
    def _start_keys():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(first_k < length)
    def _accumulate():
        q, do, k, v = q_ref[0], do_ref[0], k_ref[0], v_ref[0]
        if not problem.spare:
            q, do = _rows(q_ref, first_q, queries), _rows(do_ref, first_q, queries)
            k, v = _rows(k_ref, first_k, problem.keys), _rows(v_ref, first_k, problem.keys)
        weights = jnp.exp2(dot(k, q, ROWS_BY_ROWS) - lse_ref[0, 0])
        slope = weights * (dot(v, do, ROWS_BY_ROWS) - delta_ref[0, 0])
        if not problem.spare:
            key = first_k + jax.lax.broadcasted_iota(jnp.int32, weights.shape, 0)
            query = first_q + jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
            seen = (key < length) & (query < queries)
            weights, slope = (jnp.where(seen, x, 0.0) for x in (weights, slope))
        weights, slope = weights.astype(q.dtype), slope.astype(q.dtype)
        dv_sum[...] += dot(weights, do)
        dk_sum[...] += dot(slope, q)
        dq_sum[at] += dot(slope, k, COLUMNS_BY_COLUMNS)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _finish_keys():
        dk_ref[0] = (dk_sum[...] * (1 / LOG2E)).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _finish_queries():
        dq_ref[0] = (dq_sum[at] * problem.scale).astype(dq_ref.dtype)
