"""Fused STDiT attention on TPUs (Pallas, Mosaic), temporal mode: T tokens at each of S positions, T up to 128.

One program takes [T, G neighbouring positions, 3C] as it lies in memory. Up to T = 16 all of it is one tile of scores;
above, a tile holds a few positions over all T: the block is laid out in fast memory as 32-bit words (two bfloat16
positions each), so that a load with a stride picks one pair of positions over time. Rows of different positions hide
each other through an additive block-diagonal table that stays in fast memory. Softmax is a single pass; backward
recomputes the scores, and dq, dk, dv come out of one kernel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.tpu_lanes import (
    COLUMNS_BY_COLUMNS,
    LANES,
    LOG2E,
    ROWS_BY_ROWS,
    TINY,
    Heads,
    Preparation,
    dot,
    norm_weight,
)

MAX_ROW = 128
BLIND = -1e30
TOGETHER = 4  # heads whose stages interleave: hides the latency of one behind the others
VMEM_LIMIT = 100 << 20


class Problem(NamedTuple):
    """The static part of a call."""

    heads: Heads
    frames: int
    positions: int
    block: int  # neighbouring positions of one program
    units: int  # strided loads of one tile; 0: the block is one tile as it lies
    itemsize: int
    norm_first: bool
    interpret: bool

    @property
    def padded(self) -> int:
        """Frames in fast memory: whole sublanes."""
        return self.frames if self.units == 0 else -(-self.frames // 8) * 8

    @property
    def pack(self) -> int:
        """Positions in one 32-bit word."""
        return 4 // self.itemsize

    @property
    def words(self) -> int:
        """Words of one frame of the block (a load's stride)."""
        return self.block // self.pack

    @property
    def rows(self) -> int:
        """Rows of one tile."""
        return self.frames * self.block if self.units == 0 else self.units * self.padded * self.pack

    @property
    def tiles(self) -> int:
        return 1 if self.units == 0 else self.words // self.units

    def frame_of_row(self) -> np.ndarray:
        row = np.arange(self.rows)
        return row // self.block if self.units == 0 else row // self.pack % self.padded

    def position_of_row(self) -> np.ndarray:
        row = np.arange(self.rows)
        if self.units == 0:
            return row % self.block
        return row // (self.padded * self.pack) * self.pack + row % self.pack


def supports(call: Call) -> None:
    if call.queries > MAX_ROW:
        raise Unsupported(f"{call.queries} frames are more than {MAX_ROW}")


def tile_rows() -> int:
    """Rows of a tile of scores: what the static schedule prefers (v5e: 128, v6e: 256; 2026-11-21)."""
    return 128 if spec.chip() == "v5e" else 256


def attend(qkv_btsc, heads, extras, rope, norm_first, kv_mask, interpret, block=None, units=None):
    b, t, s, c3 = qkv_btsc.shape
    itemsize = qkv_btsc.dtype.itemsize
    if block is None:
        block = 16 if t <= 64 else 8
    if units is None:
        rows = -(-t // 8) * 8 * 4 // itemsize  # of one strided load
        units = 0 if t * block <= 256 else max(1, min(block * itemsize // 4, tile_rows() // rows))
        while block * itemsize // 4 % max(units, 1):
            units -= 1
    problem = Problem(heads, t, s, block, units, itemsize, norm_first, interpret)
    extras = dict(extras)
    frame, position = problem.frame_of_row(), problem.position_of_row()
    same = (position[:, None] == position[None, :]) & (frame < t)[None, :]
    shown = jnp.asarray(same)[None]
    if kv_mask is not None:
        shown = shown & kv_mask[:, np.minimum(frame, t - 1)][:, None, :]
    extras["bias"] = jnp.where(shown, 0.0, BLIND).astype(jnp.float32)
    if rope is not None:
        tables = jnp.stack([table.astype(jnp.float32)[np.minimum(frame, t - 1)] for table in rope])
        extras["rope"] = jnp.tile(tables, (1, 1, heads.count))
    return _attend(qkv_btsc, extras, problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv, extras, problem):
    return _call(_forward_kernel, "stdit_temporal", problem, 1, qkv, extras)[0]


def _attend_forward(qkv, extras, problem):
    return _attend(qkv, extras, problem), (qkv, extras)


def _attend_backward(problem, residuals, d_out):
    qkv, extras = residuals
    d_qkv, *d_norm = _call(_backward_kernel, "stdit_temporal_backward", problem, 3, qkv, extras, d_out)
    d_extras = jax.tree.map(jnp.zeros_like, extras)
    if d_norm:
        d_extras["norm"] = d_norm[0].sum((0, 1, 3))
    return d_qkv, d_extras


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, name, problem, width, qkv, extras, *d_out):
    """`width`: channels of the result in units of C."""
    b, t, s, c3 = qkv.shape
    channels, block = c3 // 3, problem.block
    grid = (b, -(-s // block))
    tile = lambda n: pl.BlockSpec((1, t, block, n * channels), lambda i, j: (i, 0, j, 0))
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
    specs = {key: whole(x) for key, x in extras.items()}
    if extras["bias"].shape[0] > 1:
        specs["bias"] = pl.BlockSpec((1, *extras["bias"].shape[1:]), lambda i, j: (i, 0, 0))
    out_specs, out_shape = [tile(width)], [jax.ShapeDtypeStruct((b, t, s, width * channels), qkv.dtype)]
    if d_out and "norm" in extras:
        out_specs.append(pl.BlockSpec((1, 1, 2, 8, channels), lambda i, j: (i, j, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((*grid, 2, 8, channels), jnp.float32))
    scratch = []
    if problem.units:
        word = jnp.float32 if problem.itemsize == 4 else jnp.int32
        words = problem.padded * problem.words
        inputs = 3 * problem.heads.tiles + (problem.heads.tiles if d_out else 0)
        scratch = [pltpu.VMEM((n, words, LANES), word) for n in (inputs, width * problem.heads.tiles)]
    return pl.pallas_call(
        functools.partial(kernel, problem=problem),
        grid=grid,
        in_specs=[tile(3), *(tile(1) for _ in d_out), specs],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=problem.interpret,
        name=name,
    )(qkv, *d_out, extras)


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
                x = ref[0, :, :, tile * LANES : (tile + 1) * LANES].reshape(-1, LANES)
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
            shape = (problem.frames, problem.block, LANES)
            self.output[0, :, :, tile * LANES : (tile + 1) * LANES] = x.reshape(shape)
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
            shape = (problem.frames, problem.block, LANES)
            self.output[0, :, :, tile * LANES : (tile + 1) * LANES] = x.reshape(shape)

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


def _forward_kernel(qkv_ref, extras, o_ref, *scratch, problem):
    heads = problem.heads
    block = _Block(problem, [qkv_ref], o_ref, scratch)
    dtype = o_ref.dtype

    def logits(index, head):
        q, prepare = _prepared(block, extras, head, 0, index)
        q = (prepare.forward(q) * _scale(problem)).astype(dtype)
        if "norm" in extras or "rope" in extras:
            k, prepare = _prepared(block, extras, head, 1, index)
            k = prepare.forward(k).astype(dtype)
        else:
            k = heads.gather(block.read(1, index), head)  # foreign lanes meet zeros of q
        return dot(q, k, ROWS_BY_ROWS) + extras["bias"][0]

    def attended(index, head, weights, peak):
        v = heads.gather(block.read(2, index), head)
        v = jnp.where(heads.own(head, problem.rows), v, jnp.ones((), dtype))
        out = dot(weights, v)
        total = out[:, heads.spare(head) : heads.spare(head) + 1]
        return out * jnp.where(peak > BLIND / 2, 1.0 / jnp.maximum(total, TINY), 0.0)

    def body(index):
        tiles = [None] * heads.tiles
        for first in range(0, heads.count, TOGETHER):
            group = range(first, min(first + TOGETHER, heads.count))
            scores = [logits(index, head) for head in group]
            peaks = [x.max(-1, keepdims=True) for x in scores]
            weights = [jnp.exp2(x - peak).astype(dtype) for x, peak in zip(scores, peaks)]
            for head, w, peak in zip(group, weights, peaks):
                heads.scatter(tiles, head, attended(index, head, w, peak))
        for tile, x in enumerate(tiles):
            block.write(tile, index, x)

    block.each(body)


def _backward_kernel(qkv_ref, do_ref, extras, d_ref, *rest, problem):
    heads, rows = problem.heads, problem.rows
    d_norm_ref, scratch = (rest[0], rest[1:]) if "norm" in extras else (None, rest)
    block = _Block(problem, [qkv_ref, do_ref], d_ref, scratch)
    dtype = d_ref.dtype
    if d_norm_ref is not None:
        d_norm_ref[...] = jnp.zeros_like(d_norm_ref)

    def body(index):
        tiles = [[None] * heads.tiles for _ in range(3)]
        for head in range(heads.count):
            own = heads.own(head, rows)
            q_raw, q_prepare = _prepared(block, extras, head, 0, index)
            k_raw, k_prepare = _prepared(block, extras, head, 1, index)
            q = (q_prepare.forward(q_raw) * _scale(problem)).astype(dtype)
            k = k_prepare.forward(k_raw).astype(dtype)
            v = heads.gather(block.read(2, index), head)
            do = jnp.where(own, heads.gather(block.read(3, index), head), jnp.zeros((), dtype))
            scores = dot(q, k, ROWS_BY_ROWS) + extras["bias"][0]
            peak = scores.max(-1, keepdims=True)
            weights = jnp.exp2(scores - peak)
            seen = jnp.where(peak > BLIND / 2, 1.0 / weights.sum(-1, keepdims=True), 0.0)
            weights = weights * seen
            d_weights = dot(do, v, ROWS_BY_ROWS)
            slope = (weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))).astype(dtype)
            heads.scatter(tiles[2], head, dot(weights.astype(dtype), do, COLUMNS_BY_COLUMNS))
            d_prepared = (
                dot(slope, k) * heads.dim**-0.5,
                dot(slope, q, COLUMNS_BY_COLUMNS) * (1 / LOG2E),
            )
            for which, (raw, prepare, d) in enumerate(zip((q_raw, k_raw), (q_prepare, k_prepare), d_prepared)):
                d, d_weight = prepare.backward(raw, jnp.where(own, d, 0.0))
                heads.scatter(tiles[which], head, d)
                if d_weight is not None:
                    _add(d_norm_ref, heads, head, which, d_weight)
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
