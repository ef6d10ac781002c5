"""Backward pass of temporal mode (stdit_tpu_temporal.py): scores are recomputed, dq, dk and dv come out of one kernel.

Up to T = 16 the block [T, G positions, 3C] is one tile of scores as it lies; above, it is laid out as 32-bit words as in
the forward pass. Rows of different positions hide each other through an additive table. Norm and rotation are redone
and undone head by head (tpu_lanes.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import spec
from opensora_jax.kernels.tpu_lanes import (
    COLUMNS_BY_COLUMNS,
    LANES,
    LOG2E,
    ROWS_BY_ROWS,
    Preparation,
    dot,
    norm_weight,
)

BLIND = -1e30
TOGETHER = 4  # heads whose stages interleave (v6e, T=64: 4% fewer bundles than two)


def tile_rows() -> int:
    """Rows of a tile of scores: what the static schedule prefers (v5e: 128, v6e: 256; 2026-11-21)."""
    return 128 if spec.chip() == "v5e" else 256


def layout(problem):
    """The problem with the tiles of this pass."""
    block = 16 if problem.frames <= 64 else 8
    units = 0
    if problem.frames * block > 256:
        rows = -(-problem.frames // 8) * 8 * 4 // problem.itemsize  # of one strided load
        units = max(1, min(block * problem.itemsize // 4, tile_rows() // rows))
        while block * problem.itemsize // 4 % units:
            units -= 1
    return problem._replace(block=block, units=units)


def gradients(qkv, norm, rope, shown, d_out, problem, vmem_limit):
    """(of qkv, of the norm's weights [2, C] or None)."""
    problem = layout(problem)
    frame, position = problem.frame_of_row(), np.asarray(problem.position_of_row())
    line = np.minimum(frame, problem.frames - 1)
    same = jnp.asarray((position[:, None] == position[None, :]) & (frame < problem.frames)[:, None])[None]
    if shown is not None:
        same = same & (shown[:, line] > 0)[:, :, None]
    extras = {"bias": jnp.where(same, 0.0, BLIND).astype(jnp.float32)}
    if norm is not None:
        extras["norm"] = norm
    if rope is not None:
        tables = jnp.stack([table.astype(jnp.float32)[line] for table in rope])
        extras["rope"] = jnp.tile(tables, (1, 1, problem.heads.count))
    d_qkv, *d_norm = _call(problem, qkv, extras, d_out, vmem_limit)
    return d_qkv, d_norm[0].sum((0, 1, 3)) if d_norm else None


def _call(problem, qkv, extras, d_out, vmem_limit):
    channels = problem.heads.channels
    grid = (qkv.shape[1], -(-problem.positions // problem.block))
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
    specs = {key: whole(x) for key, x in extras.items()}
    if extras["bias"].shape[0] > 1:
        specs["bias"] = pl.BlockSpec((1, *extras["bias"].shape[1:]), lambda i, j: (i, 0, 0))
    out_specs, out_shape = [problem.of_program(3)], [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    if "norm" in extras:
        out_specs.append(pl.BlockSpec((1, 1, 2, 8, channels), lambda i, j: (i, j, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((*grid, 2, 8, channels), jnp.float32))
    scratch = []
    if problem.units:
        word = jnp.float32 if problem.itemsize == 4 else jnp.int32
        words = problem.padded * problem.words
        scratch = [pltpu.VMEM((n * problem.heads.tiles, words, LANES), word) for n in (4, 3)]
    return pl.pallas_call(
        functools.partial(kernel, problem=problem),
        grid=grid,
        in_specs=[problem.of_program(3), problem.of_program(1), specs],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_limit),
        interpret=problem.interpret,
        name="stdit_temporal_backward",
    )(qkv, d_out, extras)


class _Block:
    """Reads and writes [rows, 128] tiles of one program's block, either as they lie or through the word scratch."""

    def __init__(self, problem, inputs, output, scratch):
        self.problem, self.inputs, self.output = problem, inputs, output
        self.words_in, self.words_out = scratch or (None, None)
        self.dtype = output.dtype
        self.exists = None
        if problem.positions % problem.block:
            first = pl.program_id(1) * problem.block
            shape = (problem.frames, problem.block, LANES)
            position = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            self.exists = (position + first < problem.positions).reshape(-1, LANES)
        if scratch:
            self._lay_out()

    def _raw(self, tile):
        """[frames * block, 128] of tile `tile` of the concatenated inputs, zero beyond the last position."""
        for ref in self.inputs:
            count = ref.shape[-1] // LANES
            if tile < count:
                x = ref[..., tile * LANES : (tile + 1) * LANES].reshape(-1, LANES)
                return x if self.exists is None else jnp.where(self.exists, x, jnp.zeros((), x.dtype))
            tile -= count
        raise AssertionError(tile)

    def _lay_out(self):
        """All inputs as words: row = frame * words + word."""
        problem = self.problem
        used = problem.frames * problem.words
        for tile in range(self.words_in.shape[0]):
            x = self._raw(tile)
            self.words_in[tile, :used, :] = x if problem.pack == 1 else pltpu.bitcast(x, jnp.int32)
            if problem.padded != problem.frames:
                extra = (problem.padded - problem.frames) * problem.words
                self.words_in[tile, used:, :] = jnp.zeros((extra, LANES), self.words_in.dtype)

    def read(self, which, index):
        """tile → [rows, 128] of input `which` (q, k, v, d_out)."""
        problem = self.problem
        if problem.units == 0:
            return lambda tile: self._raw(which * problem.heads.tiles + tile)

        def load(tile):
            parts = []
            for unit in range(problem.units):
                at = pl.ds(index * problem.units + unit, problem.padded, stride=problem.words)
                parts.append(self.words_in.at[which * problem.heads.tiles + tile][at, :])
            x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)
            return x if problem.pack == 1 else pltpu.bitcast(x, self.dtype)

        return load

    def write(self, tile, index, x):
        problem = self.problem
        x = x.astype(self.dtype)
        if problem.units == 0:
            self._put(tile, x)
            return
        words = x if problem.pack == 1 else pltpu.bitcast(x, jnp.int32)
        for unit in range(problem.units):
            at = pl.ds(index * problem.units + unit, problem.padded, stride=problem.words)
            self.words_out.at[tile][at, :] = words[unit * problem.padded : (unit + 1) * problem.padded]

    def finish(self):
        """Words back to positions."""
        problem = self.problem
        for tile in range(self.words_out.shape[0] if problem.units else 0):
            x = self.words_out[tile, : problem.frames * problem.words, :]
            x = x if problem.pack == 1 else pltpu.bitcast(x, self.dtype)
            self._put(tile, x)

    def _put(self, tile, x):
        self.output[..., tile * LANES : (tile + 1) * LANES] = x.reshape(*self.output.shape[:-1], LANES)

    def each(self, body):
        """body(index) for every tile of scores."""
        if self.problem.tiles == 1:
            body(0)
        else:
            jax.lax.fori_loop(0, self.problem.tiles, lambda i, _: (body(i), 0)[1], 0)
        self.finish()


def _own(heads, head, read, rows):
    return jnp.where(heads.own(head, rows), heads.gather(read, head).astype(jnp.float32), 0.0)


def _prepared(block, extras, head, which, index):
    """Raw head and its preparation."""
    problem = block.problem
    tables = (None, None)
    if "rope" in extras:
        read = lambda i: lambda tile: extras["rope"][i, :, tile * LANES : (tile + 1) * LANES]
        tables = tuple(problem.heads.gather(read(i), head) for i in range(2))
    raw = _own(problem.heads, head, block.read(which, index), problem.rows)
    weight = norm_weight(problem.heads, head, which, extras.get("norm"))
    return raw, Preparation(weight, *tables, problem.norm_first, problem.heads.dim, block.dtype, matrix_sums=True)


def _scale(problem):
    return problem.heads.dim**-0.5 * LOG2E


def kernel(qkv_ref, do_ref, extras, d_ref, *rest, problem):
    heads, rows = problem.heads, problem.rows
    d_norm_ref, scratch = (rest[0], rest[1:]) if "norm" in extras else (None, rest)
    block = _Block(problem, [qkv_ref, do_ref], d_ref, scratch)
    plain = "norm" not in extras and "rope" not in extras
    dtype = d_ref.dtype
    if d_norm_ref is not None:
        d_norm_ref[...] = jnp.zeros_like(d_norm_ref)

    def body(index):
        tiles = [[None] * heads.tiles for _ in range(3)]

        def start(head):
            """Logits and gradients of the weights, with the operands that they were made of."""
            raw, prepare = _prepared(block, extras, head, 0, index)
            q = (prepare.forward(raw) * _scale(problem)).astype(dtype)
            if plain:
                k = heads.gather(block.read(1, index), head)  # other heads' lanes meet zeros in q
            else:
                raw, prepare = _prepared(block, extras, head, 1, index)
                k = prepare.forward(raw).astype(dtype)
            v = heads.gather(block.read(2, index), head)
            do = jnp.where(heads.own(head, rows), heads.gather(block.read(3, index), head), jnp.zeros((), dtype))
            return dot(k, q, ROWS_BY_ROWS) + extras["bias"][0], dot(v, do, ROWS_BY_ROWS), q, k, do

        def soften(scores, d_weights, *operands):
            """Weights and gradients of the logits, [keys, queries]: sums over keys cross no lanes."""
            peak = scores.max(0, keepdims=True)
            weights = jnp.exp2(scores - peak)
            weights = weights * jnp.where(peak > BLIND / 2, 1.0 / weights.sum(0, keepdims=True), 0.0)
            slope = weights * (d_weights - (weights * d_weights).sum(0, keepdims=True))
            return weights.astype(dtype), slope.astype(dtype), *operands

        def finish(head, weights, slope, q, k, do):
            own = heads.own(head, rows)
            d_prepared = (
                dot(slope, k, COLUMNS_BY_COLUMNS) * heads.dim**-0.5,
                dot(slope, q) * (1 / LOG2E),
            )
            heads.scatter(tiles[2], head, dot(weights, do))
            for which, d in enumerate(d_prepared):
                raw, prepare = _prepared(block, extras, head, which, index)
                d, d_weight = prepare.backward(raw, jnp.where(own, d, 0.0))
                heads.scatter(tiles[which], head, d)
                if d_weight is not None:
                    _add(d_norm_ref, heads, head, which, d_weight)

        groups = [range(first, min(first + TOGETHER, heads.count)) for first in range(0, heads.count, TOGETHER)]
        started, softened = {}, {}
        # One group's products run beside the softmax of the group before and the gradients of the one before that.
        for starting, between, ending in zip([*groups, [], []], [[], *groups, []], [[], [], *groups]):
            for head in starting:
                started[head] = start(head)
            for head in between:
                softened[head] = soften(*started.pop(head))
            for head in ending:
                finish(head, *softened.pop(head))
        for which in range(3):
            for tile, x in enumerate(tiles[which]):
                block.write(which * heads.tiles + tile, index, x)

    block.each(body)


def _add(ref, heads, head, which, d_weight):
    """Adds a head's rows to the sums [8, C] of one norm; the foreign lanes of d_weight are zero."""
    tile, _, spans = heads.place(head)
    total = d_weight.reshape(-1, 8, LANES).sum(0)
    lane = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
    first = heads.place(head)[1]
    for step in range(1 + spans):
        here = jnp.where((lane >= first) == (step == 0), total, 0.0) if spans else total
        lanes = slice((tile + step) * LANES, (tile + step + 1) * LANES)
        ref[0, 0, which, :, lanes] = ref[0, 0, which, :, lanes] + here
