"""Backward pass of the spatial kernel (stdit_tpu.py): grid (row); scores are recomputed tile by tile (tpu_slopes.py).

Short rows are one straight line of tiles over all heads; in longer ones the blocks of queries are a loop.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, tpu_channels, tpu_slopes
from opensora_jax.kernels.spec import Call
from opensora_jax.kernels.tpu_lanes import LANES, LOG2E
from opensora_jax.kernels.tpu_rows import (
    extra_bytes,
    extra_specs,
    own_float,
    preparation,
    reader,
    row_sizes,
    rows_inside,
    rows_shown,
    whole_row,
)

STRAIGHT = 4  # blocks
LONGEST_BLOCK = 256  # queries


def least_bytes(call: Call) -> int:
    """Of fast memory."""
    return _bytes(*row_sizes(call), buffers=1)


def _bytes(padded: int, channels: int, itemsize: int, extra: int, buffers: int) -> int:
    """Not less than the compiler asks for. Heads of 72 in bfloat16, 2026-11-29: rows of 4,096 compile for v6e, of 2,560 for
    v5p; the straight line of 1,024 with norm, rotation, mask and two buffers takes 78 MiB."""
    moving = (
        buffers * (8 * channels + LANES) * itemsize
    )  # qkv and its gradients, the result and its gradient, logarithms
    at_work = (39_424 if padded <= STRAIGHT * LONGEST_BLOCK else 6_144) * itemsize // 2
    return padded * (moving + at_work + extra)


def gradients(qkv, extras, d_out, out, logs, problem):
    """Of qkv and, where there is a norm, of its weights: [rows, 2, 8, C]. logs: [pieces, rows, .., 128], the forward pass's."""
    rows, c3 = qkv.shape[1], qkv.shape[3]
    padded = max(problem.padded, -(-problem.size // problem.block_backward) * problem.block_backward)
    extra = extra_bytes("rope" in extras, "hidden" in extras)
    double = _bytes(padded, c3 // 3, qkv.dtype.itemsize, extra, buffers=2) <= blocks.vmem()
    single = {} if double else {"pipeline_mode": pl.Buffered(1)}
    row = lambda width: pl.BlockSpec(whole_row(problem, padded, width), lambda i: (0, i, 0, 0), **single)
    out_specs, out_shape = [row(c3)], [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    if "norm" in extras:
        out_specs.append(pl.BlockSpec((1, 2, 8, c3 // 3), lambda i: (i, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((rows, 2, 8, c3 // 3), jnp.float32))
    extras = extras | {"spread": tpu_channels.spreading(problem.heads, qkv.dtype)}
    total = pltpu.VMEM((2, problem.heads.rows, problem.padded), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        grid=(rows,),
        in_specs=[row(c3), row(c3 // 3), row(c3 // 3), row(LANES), extra_specs(extras, problem)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((padded, LANES), qkv.dtype), total, total],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem()),
        interpret=problem.interpret,
        name="stdit_spatial_backward",
    )(qkv, d_out, out, logs, extras)


def _kernel(qkv_ref, do_ref, out_ref, logs_ref, extras, d_ref, *rest, problem):
    d_norm_ref, (deltas, *sums) = (rest[0], rest[1:]) if "norm" in extras else (None, rest)
    row = _Row(problem, extras, qkv_ref, do_ref, out_ref, logs_ref, d_ref, d_norm_ref, deltas, sums)
    heads, blocks = range(problem.heads.count), -(-problem.size // problem.block_backward)
    if blocks <= STRAIGHT:
        for i in range(blocks):
            row.sum_deltas(i)
        tpu_slopes.pipeline(
            [(head, i, *tile) for head in heads for i in range(blocks) for tile in row.tiles], *row.stages
        )
        return

    def deltas_of_block(i, carry):
        row.first = i
        row.sum_deltas(0)
        return carry

    jax.lax.fori_loop(0, blocks, deltas_of_block, 0)
    for head in heads:
        row.open(head)
        for total in sums:
            total[head % 2] = jnp.zeros_like(total[0])

        def block(i, d_weight, head=head):
            row.first, row.d_weight = i, d_weight
            tpu_slopes.pipeline([(head, 0, *tile) for tile in row.tiles], *row.stages)
            return row.d_weight

        row.d_weight = jax.lax.fori_loop(0, blocks, block, row.d_weight)
        row.close(head)


class _Row:
    """One program: what is open of heads and blocks while tiles go by."""

    def __init__(self, problem, extras, qkv_ref, do_ref, out_ref, logs_ref, d_ref, d_norm_ref, deltas, sums):
        self.problem, self.heads, self.extras = problem, problem.heads, extras
        self.qkv_ref, self.do_ref, self.out_ref, self.logs_ref = qkv_ref, do_ref, out_ref, logs_ref
        self.d_ref, self.d_norm_ref, self.deltas, self.sums = d_ref, d_norm_ref, deltas, sums
        self.dtype, self.rows, self.padded = qkv_ref.dtype, problem.block_backward, problem.padded
        self.whole = (0, 0, slice(0, self.padded)) if problem.pieces == 1 else (slice(None), 0, slice(None))
        self.valid = rows_inside(self.padded, problem.size) if self.padded != problem.size else None
        self.shown = rows_shown(problem, extras, self.valid)
        self.ragged = bool(self.valid is not None or problem.size % self.rows)
        queries = tpu_slopes.cuts(self.rows, tpu_slopes.QUERY_TILE)
        keys = tpu_slopes.cuts(self.padded, tpu_slopes.KEY_TILE)
        self.tiles = [(at_query, at_key) for at_query in queries for at_key in keys]
        self.stages = self.start, self.soften, self.finish
        self.keys, self.queries, self.products, self.softened, self.d_q = {}, {}, {}, {}, {}
        self.d_weight = jnp.zeros((8, LANES), jnp.float32)
        self.first = 0  # block of the loop that runs; all others count from it

    def at(self, i):
        """The first query of a block, and where the block lies."""
        i += self.first
        if self.problem.pieces == 1:
            first = i * self.rows if isinstance(i, int) else pl.multiple_of(i * self.rows, 16)
            return first, (0, 0, pl.ds(first, self.rows))
        count = self.rows // self.problem.piece
        return i * self.rows, (pl.ds(i * count, count), 0, slice(None))

    def sum_deltas(self, i):
        first, at = self.at(i)
        do, out = (
            lambda lanes, ref=ref: ref[(*at, lanes)].reshape(self.rows, -1) for ref in (self.do_ref, self.out_ref)
        )
        self.deltas[pl.ds(first, self.rows), :] = tpu_slopes.deltas(
            self.heads, do, out, self.extras["spread"], self.dtype
        )

    def start(self, head, i, at_query, at_key):
        if at_query.start == at_key.start == 0:
            if head not in self.keys:
                self.open(head)
            self.queries[head, i] = self._queries(head, i)
        self.products[head, i, at_query.start, at_key.start] = tpu_slopes.products(
            self.keys[head], self.queries[head, i], at_key, at_query
        )

    def soften(self, head, i, at_query, at_key):
        tile = head, i, at_query.start, at_key.start
        self.softened[tile] = tpu_slopes.slopes(*self.products.pop(tile), self.dtype)

    def finish(self, head, i, at_query, at_key):
        slopes = self.softened.pop((head, i, at_query.start, at_key.start))
        *d_keys, dq = tpu_slopes.gradients(self.keys[head], self.queries[head, i], at_key, at_query, *slopes)
        straight = isinstance(self.first, int)
        for total, x in zip(self.sums, d_keys):
            total[head % 2, :, at_key] = x if straight and i == at_query.start == 0 else total[head % 2, :, at_key] + x
        parts = self.d_q.setdefault((head, i), [])
        if at_key.start:
            parts[-1] += dq
        else:
            parts.append(dq)
        if at_query.stop == self.rows and at_key.stop == self.padded:
            self._close_queries(head, i, jnp.concatenate(self.d_q.pop((head, i)), 1))
            if straight and (i + 1) * self.rows >= self.problem.size:
                self.close(head)

    def open(self, head):
        k = self._preparation(head, 1, 0).forward(self._raw(head, 1, self.whole, self.valid))
        v = self.heads.gather(reader(self.qkv_ref, 2, self.heads, self.whole), head)
        self.keys[head] = tpu_slopes.key_operands(self.heads, head, k * self.problem.scale, v, self.shown)

    def _raw(self, head, which, at, exists):
        rows = self.padded if which else self.rows
        return own_float(reader(self.qkv_ref, which, self.heads, at), self.heads, head, rows, exists)

    def _preparation(self, head, which, first):
        rows = self.padded if which else self.rows
        return preparation(self.problem, self.extras, head, which, first, rows, self.dtype)

    def _exists(self, first):
        return rows_inside(self.rows, self.problem.size, first) if self.ragged else None

    def _queries(self, head, i):
        first, at = self.at(i)
        exists = self._exists(first)
        if "norm" in self.extras or "rope" in self.extras:
            q = self._preparation(head, 0, first).forward(self._raw(head, 0, at, exists)).astype(self.dtype)
        else:
            q = self.heads.gather(reader(self.qkv_ref, 0, self.heads, at), head)
        do = self.heads.gather(reader(self.do_ref, 0, self.heads, at), head)
        marks = self.logs_ref[at].reshape(self.rows, LANES), self.deltas[pl.ds(first, self.rows), :]
        return tpu_slopes.query_operands(self.heads, head, q, do, *marks, exists)

    def _close_queries(self, head, i, dq):
        first, at = self.at(i)
        dq = self.heads.put_rows(dq, head).T * (1 / LOG2E)
        dq, d_weight = self._preparation(head, 0, first).backward(self._raw(head, 0, at, self._exists(first)), dq)
        _merge(self.d_ref, self.heads, head, 0, at, dq.astype(self.dtype))
        if d_weight is not None:
            self.d_weight = self.d_weight + _fold(d_weight)

    def close(self, head):
        """Gradients of keys, values and weights of the norm."""
        dv, dk = (self.heads.put_rows(total[head % 2], head).T for total in self.sums)
        dv = dv if self.shown is None else jnp.where(self.shown, dv, 0.0)
        k_raw = self._raw(head, 1, self.whole, self.valid)
        dk, d_weight = self._preparation(head, 1, 0).backward(k_raw, dk * (self.problem.scale / LOG2E))
        _merge(self.d_ref, self.heads, head, 1, self.whole, dk.astype(self.dtype))
        _merge(self.d_ref, self.heads, head, 2, self.whole, dv.astype(self.dtype))
        if d_weight is not None:
            _merge(self.d_norm_ref, self.heads, head, 0, (0, 0, slice(None)), self.d_weight)
            _merge(self.d_norm_ref, self.heads, head, 0, (0, 1, slice(None)), _fold(d_weight))
            self.d_weight = jnp.zeros_like(self.d_weight)


def _fold(x):
    """Sum of the rows as [8, 128], so that no sublanes are crossed."""
    return x.reshape(x.shape[0] // 8, 8, LANES).sum(0)


def _merge(ref, heads, head, which, at, x):
    """Writes the head's lanes of x into its tiles of q (0), k (1) or v (2), to the rows `at`. Heads come in order: what lies
    beyond the head in its last tile is written later, what lies before it in its first tile is kept."""
    tile, first, spans = heads.place(head)
    for step in range(1 + spans):
        lanes = slice((which * heads.tiles + tile + step) * LANES, (which * heads.tiles + tile + step + 1) * LANES)
        there = ref[(*at, lanes)]
        keep = step == 0 and first > 0
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        merged = jnp.where(lane >= first, x, there.reshape(x.shape)) if keep else x
        ref[(*at, lanes)] = merged.reshape(there.shape)
