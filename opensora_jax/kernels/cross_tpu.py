"""Cross-attention on TPUs: many queries over a short text whose keys and values stay in fast memory.

Forward is the spatial kernel of stdit_tpu.py with keys of their own. Backward: grid (sample, block of queries); the
gradients of keys and values gather in fast memory over the blocks and leave with the last one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks
from opensora_jax.kernels.stdit_tpu import Problem, even_blocks, forward_call
from opensora_jax.kernels.tpu_lanes import COLUMNS_BY_COLUMNS, HIDE, LANES, LOG2E, ROWS_BY_ROWS, Heads, at_lane, dot
from opensora_jax.kernels.tpu_rows import extra_specs, hide_keys, own_float, reader, rows_inside, rows_shown
from opensora_jax.kernels.tpu_slopes import pipeline
from opensora_jax.kernels.xla import key_visibility

MAX_KEYS = 1024


def attend(q, k, v, kv_lengths, kv_mask, heads: Heads, scale, interpret):
    """[n * B, T, C] over [B, S, C]: sample i of the queries sees the keys of sample i modulo B."""
    queries = lambda stage: even_blocks(q.shape[1], *blocks.find("cross_attention", stage, heads.dim, k.shape[1]))
    # The kernels scale by 1/sqrt(H); any other scale is put into q.
    usual = heads.dim**-0.5
    q = q if scale == usual else q * jnp.asarray(scale / usual, q.dtype)
    problem = Problem(heads, k.shape[1], queries("forward"), queries("backward"), True, 1, interpret)
    extras = {}
    shown = key_visibility(k.shape[1], kv_lengths, kv_mask)
    if shown is not None:
        hidden = jnp.where(shown, 0.0, HIDE).astype(jnp.float32)
        extras["hidden"] = jnp.broadcast_to(hidden[:, :, None], (*hidden.shape, LANES))
    return _attend(q, k, v, extras, problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, extras, problem):
    return forward_call("cross_attention", q[None], k[None], v[None], (0, 0, 0), extras, problem)[0]


def _attend_forward(q, k, v, extras, problem):
    return _attend(q, k, v, extras, problem), (q, k, v, extras)


def _attend_backward(problem, residuals, d_out):
    q, *once = residuals
    repeats = q.shape[0] // once[0].shape[0]
    k, v, extras = jax.tree.map(lambda a: jnp.tile(a, (repeats, 1, 1)), once)
    batch, queries, channels = q.shape
    padded, block, heads = problem.padded, problem.block_backward, problem.heads
    at_query = pl.BlockSpec((1, block, channels), lambda b, i: (b, i, 0))
    whole = pl.BlockSpec((1, padded, channels), lambda b, i: (b, 0, 0))
    tiles = lambda dtype: pltpu.VMEM((heads.count, padded, LANES), dtype)
    d_q, *d_text = pl.pallas_call(
        functools.partial(_backward_kernel, problem=problem, queries=queries),
        grid=(batch, -(-queries // block)),
        in_specs=[at_query, whole, whole, at_query, extra_specs(extras, problem)],
        out_specs=[at_query, whole, whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[tiles(q.dtype), tiles(q.dtype), tiles(jnp.float32), tiles(jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="cross_backward",
    )(q, k, v, d_out, extras)
    add = lambda d: d.reshape(repeats, -1, *d.shape[1:]).astype(jnp.float32).sum(0).astype(d.dtype)
    return d_q, *(map(add, d_text) if repeats > 1 else d_text), jax.tree.map(jnp.zeros_like, once[2])


_attend.defvjp(_attend_forward, _attend_backward)


def _backward_kernel(
    q_ref, k_ref, v_ref, do_ref, extras, dq_ref, dk_ref, dv_ref, keys, values, dk_sum, dv_sum, *, problem, queries
):
    heads, padded, rows = problem.heads, problem.padded, problem.block_backward
    dtype = q_ref.dtype
    index = pl.program_id(1)

    @pl.when(index == 0)
    def _prepare_text():
        exists = rows_inside(padded, problem.size) if padded != problem.size else None
        shown = rows_shown(problem, extras, exists)
        for head in range(heads.count):
            k = own_float(reader(k_ref, 0, heads), heads, head, padded, exists)
            keys[head] = hide_keys(k, head, problem, extras, exists).astype(dtype)
            values[head] = own_float(reader(v_ref, 0, heads), heads, head, padded, shown).astype(dtype)
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    exists = rows_inside(rows, queries, index * rows) if queries % rows else None
    tiles = [None] * heads.tiles
    operands, products, softened = {}, {}, {}

    def start(head):
        q = own_float(reader(q_ref, 0, heads), heads, head, rows, exists) * problem.scale
        q = at_lane(q, heads.spare(head), 1.0).astype(dtype)
        do = own_float(reader(do_ref, 0, heads), heads, head, rows, exists).astype(dtype)
        operands[head] = q, do
        products[head] = dot(keys[head], q, ROWS_BY_ROWS), dot(values[head], do, ROWS_BY_ROWS)

    def soften(head):
        softened[head] = _slopes(*products.pop(head), dtype)

    def finish(head):
        (q, do), (weights, slope) = operands.pop(head), softened.pop(head)
        dv_sum[head] += dot(weights, do)
        dk_sum[head] += dot(slope, q)
        heads.scatter(tiles, head, dot(slope, keys[head], COLUMNS_BY_COLUMNS) * (problem.scale / LOG2E))

    pipeline([(head,) for head in range(heads.count)], start, soften, finish)
    _write(dq_ref, tiles)

    @pl.when(index == pl.num_programs(1) - 1)
    def _finish():
        for ref, total, factor in ((dk_ref, dk_sum, 1 / LOG2E), (dv_ref, dv_sum, 1.0)):
            tiles = [None] * heads.tiles
            for head in range(heads.count):
                heads.scatter(tiles, head, total[head] * factor)
            _write(ref, tiles)


def _slopes(scores, d_weights, dtype):
    """Softmax weights and gradients of the logits, [keys, queries]; columns that see no key are zero."""
    peak = scores.max(0, keepdims=True)
    weights = jnp.exp2(scores - peak)
    weights = weights * jnp.where(peak > HIDE / 2, 1.0 / weights.sum(0, keepdims=True), 0.0)
    slope = weights * (d_weights - (weights * d_weights).sum(0, keepdims=True))
    return weights.astype(dtype), slope.astype(dtype)


def _write(ref, tiles):
    for tile, x in enumerate(tiles):
        ref[0, :, tile * LANES : (tile + 1) * LANES] = x.astype(ref.dtype)
