"""Fused STDiT attention on TPUs (Pallas, Mosaic), temporal mode: T tokens at each of S positions, T up to 128.

One program takes [T, G neighbouring positions, 3C] as it lies in memory and lays it out in fast memory as 32-bit words,
two bfloat16 positions each, in which a load with a stride picks one pair of positions over time: a tile of scores is
[128, 128] however long T is (more only where two positions of T do not fit). Norm and rotation happen before, on whole
channels (tpu_channels.py). Positions of one tile hide each other inside the product: the lanes of q that belong to other
heads carry the bits of its position, those of k a penalty for each bit that differs. Softmax is a single pass; its sums
are divided out once for all heads. The backward pass is in stdit_tpu_temporal_backward.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import stdit_tpu_temporal_backward, tpu_channels
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.tpu_lanes import COLUMNS_BY_COLUMNS, LANES, ROWS_BY_ROWS, Heads, dot

MAX_ROW = 128
TILE_ROWS = 128
CHUNK_ROWS = 256  # normalised and rotated at once
PERIOD = 8  # lanes of a position's code: four bits and their complements, so 16 positions a tile
FAR = -1e9
HIGH_HALF = np.int32(-65536)
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
    pieces: int  # of the frames, one behind the other
    interpret: bool

    @property
    def piece(self) -> int:
        """Frames of one piece."""
        return self.frames // self.pieces

    def of_program(self, n: int) -> pl.BlockSpec:
        """All frames of some positions, n * C lanes of [pieces, B, T / pieces, S, ..]."""
        shape = (self.pieces, 1, self.piece, self.block, n * self.heads.channels)
        return pl.BlockSpec(shape, lambda i, j: (0, i, 0, j, 0))

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
    heads = Heads(call.heads, call.head_dim)
    if call.queries > MAX_ROW:
        raise Unsupported(f"{call.queries} frames are more than {MAX_ROW}")
    if heads.dim > LANES - PERIOD:
        raise Unsupported(f"head_dim {heads.dim} leaves fewer than {PERIOD} lanes of {LANES}")
    tpu_channels.marks(heads)


def attend(qkv_btsc, heads, norm, rope, norm_first, kv_mask, pieces, interpret):
    b, t, s, c3 = qkv_btsc.shape
    t *= pieces
    itemsize = qkv_btsc.dtype.itemsize
    block = 8 if t > 64 and itemsize == 4 else 16
    units = 0
    if t * block > TILE_ROWS:
        rows = -(-t // 8) * 8 * 4 // itemsize  # of one strided load
        units = max(1, min(block * itemsize // 4, TILE_ROWS // rows))
        while block * itemsize // 4 % units:
            units -= 1
    problem = Problem(heads, t, s, block, units, itemsize, norm_first, pieces, interpret)
    shown = None if kv_mask is None else kv_mask.astype(jnp.float32)
    out = _attend(qkv_btsc.reshape(pieces, -1, *qkv_btsc.shape[1:]), norm, rope, shown, problem)
    out = out if kv_mask is None else jnp.where(kv_mask.any(-1)[:, None, None, None], out, 0)
    return out.reshape(*qkv_btsc.shape[:3], c3 // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(qkv, norm, rope, shown, problem):
    return _call(qkv, norm, rope, shown, problem)


def _attend_forward(qkv, norm, rope, shown, problem):
    return _call(qkv, norm, rope, shown, problem), (qkv, norm, rope, shown)


def _attend_backward(problem, residuals, d_out):
    qkv, norm, rope, shown = residuals
    d_qkv, d_norm = stdit_tpu_temporal_backward.gradients(qkv, norm, rope, shown, d_out, problem, VMEM_LIMIT)
    return d_qkv, d_norm, jax.tree.map(jnp.zeros_like, rope), jax.tree.map(jnp.zeros_like, shown)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(qkv, norm, rope, shown, problem):
    heads = problem.heads
    b, s = qkv.shape[1], problem.positions
    q_code, k_code = codes(problem, shown)
    extras = tpu_channels.tables(heads, norm, rope, problem.norm_first)
    extras |= {"spread": tpu_channels.spreading(heads, qkv.dtype)}
    extras |= {"q_code": q_code.astype(qkv.dtype), "k_code": k_code.astype(qkv.dtype)}
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
    specs = {key: whole(x) for key, x in extras.items()}
    if shown is not None:
        specs["k_code"] = pl.BlockSpec((1, *k_code.shape[1:]), lambda i, j: (i, 0, 0))
    word = jnp.float32 if problem.itemsize == 4 else jnp.int32
    run = functools.partial(kernel, problem=problem)
    normed = norm is not None
    return pl.pallas_call(
        lambda qkv_ref, refs, *rest: run(qkv_ref, refs | {"norm": normed}, *rest),
        grid=(b, -(-s // problem.block)),
        in_specs=[problem.of_program(3), specs],
        out_specs=problem.of_program(1),
        out_shape=jax.ShapeDtypeStruct((*qkv.shape[:4], heads.channels), qkv.dtype),
        scratch_shapes=[
            pltpu.VMEM((3 * heads.tiles, problem.padded * problem.words, LANES), word),
            pltpu.VMEM((2 * heads.tiles, max(problem.rows, CHUNK_ROWS), LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=problem.interpret,
        name="stdit_temporal",
    )(qkv, extras)


def codes(problem, seen):
    """Of the lanes that belong to other heads: q's [rows, 128] and k's [B or 1, rows, 128]."""
    position, frame = problem.position_of_row(), problem.frame_of_row()
    lane = np.arange(LANES) % PERIOD
    bit = (position[:, None] >> lane // 2 & 1) == lane % 2
    shown = jnp.asarray(frame < problem.frames)[None]
    if seen is not None:
        shown = shown & (seen[:, np.minimum(frame, problem.frames - 1)] > 0)
    hidden = jnp.where(jnp.asarray(bit)[None] & shown[:, :, None], 0.0, FAR)
    return jnp.asarray(bit, jnp.float32), hidden


def lanes(tile):
    return slice(tile * LANES, (tile + 1) * LANES)


def words_of(x):
    return x if x.dtype == jnp.float32 else pltpu.bitcast(x, jnp.int32)


def only(words, bits):
    return jnp.where(bits != 0, words, 0.0) if words.dtype == jnp.float32 else words & bits


def values_of(words, dtype):
    return words if dtype == jnp.float32 else pltpu.bitcast(words, dtype)


def unpack(words):
    """float32 values of each position in a word."""
    if words.dtype == jnp.float32:
        return [words]
    return [jax.lax.bitcast_convert_type(x, jnp.float32) for x in (words << 16, words & HIGH_HALF)]


def pack(parts, interpret):
    """The reverse, rounded."""
    if len(parts) == 1:
        return parts[0]
    if not interpret:
        return jax.lax.bitcast_convert_type(pltpu.pack_elementwise(parts, packed_dtype=jnp.bfloat16), jnp.int32)
    low, high = (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for x in parts)
    return jax.lax.shift_right_logical(low, 16) | high


def each_chunk(problem, body):
    """body(first frame, count) over all frames, never across pieces; the last chunk may repeat frames of the one before."""
    chunks = -(-problem.frames * problem.block // CHUNK_ROWS)
    count = -(-problem.frames // chunks)
    while problem.pieces > 1 and problem.piece % count:
        count -= 1
    chunks = -(-problem.frames // count)
    if chunks == 1:
        body(0, count)
    else:
        jax.lax.fori_loop(
            0, chunks, lambda i, _: (body(jnp.minimum(i * count, problem.frames - count), count), 0)[1], 0
        )


def frames_at(problem, first, count):
    """Where `count` frames from `first` lie in a block."""
    if problem.pieces == 1:
        return 0, 0, pl.ds(first, count)
    piece = jax.lax.div(first, problem.piece)
    return piece, 0, pl.ds(first - piece * problem.piece, count)


def prepare(problem, qkv_ref, extras, words, turned):
    """All of q, k, v into words; q and k normalised and rotated."""
    heads, dtype = problem.heads, qkv_ref.dtype
    tiles = heads.tiles
    pairs = [range(start, min(start + 2, tiles)) for start in range(0, tiles, 2)]
    across = lambda pair: slice(pair[0] * LANES, (pair[-1] + 1) * LANES)

    def chunk(first, count):
        rows = count * problem.words
        at = pl.ds(pl.multiple_of(first * problem.words, problem.words), rows)

        # As 32-bit words in fast memory first: bfloat16 blocks arrive in half-filled registers.
        inside = words_inside(problem, rows)
        for tile in range(3 * tiles):
            x = qkv_ref[(*frames_at(problem, first, count), slice(None), lanes(tile))]
            x = words_of(x.reshape(count * problem.block, LANES))
            words[tile, at] = x if inside is None or tile < tiles else only(x, inside)

        def times(x, name, which, tile):
            frames = pl.ds(first, count) if extras[name].shape[1] > 1 else slice(None)
            table = extras[name][which, frames, :, lanes(tile)]
            return (x.reshape(count, problem.words // 8, 8, LANES) * table[:, None]).reshape(rows, LANES)

        def turn(x, which, tile):
            """The rotation with everything folded into it: a list, one entry a position of the words."""
            parts = [times(part, "a", which, tile) for part in unpack(x)]
            if "b" in extras:
                swapped = unpack(tpu_channels.swap(x))
                parts = [y + times(part, "b", which, tile) for y, part in zip(parts, swapped)]
            return parts

        def roots(which):
            """1 / root mean square as marks; what `turn` gave waits in fast memory."""
            sums = 0.0
            for pair in pairs:
                squares = []
                for tile in pair:
                    x = words[which * tiles + tile, at]
                    parts = turn(x, which, tile)
                    for i, part in enumerate(parts):
                        turned[which * tiles + tile, i * rows : (i + 1) * rows] = part
                    source = parts if "last" in extras else unpack(x)
                    squares.append(jnp.concatenate([jnp.square(part).astype(dtype) for part in source]))
                sums = sums + dot(jnp.concatenate(squares, 1), extras["spread"][:, across(pair)], ROWS_BY_ROWS)
            return tpu_channels.split(jax.lax.rsqrt(sums * (1.0 / heads.dim) + 1e-6), dtype)

        def normalise(which, roots):
            for pair in pairs:
                spread = dot(roots, extras["spread"][:, across(pair)])
                for i, tile in enumerate(pair):
                    parts = []
                    for start in range(0, rows * problem.pack, rows):
                        y = turned[which * tiles + tile, start : start + rows] * spread[start : start + rows, lanes(i)]
                        parts.append(times(y, "last", which, tile) if "last" in extras else y)
                    words[which * tiles + tile, at] = pack(parts, problem.interpret)

        if extras["norm"]:
            for which, marks in enumerate([roots(0), roots(1)]):
                normalise(which, marks)
        else:
            for tile in range(2 * tiles):
                parts = turn(words[tile, at], tile // tiles, tile % tiles)
                words[tile, at] = pack(parts, problem.interpret)

    each_chunk(problem, chunk)
    used = problem.frames * problem.words
    for tile in range(3 * tiles if problem.padded != problem.frames else 0):
        words[tile, used:, :] = jnp.zeros((words.shape[1] - used, LANES), words.dtype)


def words_inside(problem, rows):
    """[rows, 128]: the bits of each word that are of positions that exist; None where all do. What a block reads beyond the
    last position may be anything, even NaN."""
    if problem.positions % problem.block == 0:
        return None
    exist = problem.positions - pl.program_id(1) * problem.block
    word = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) & problem.words - 1
    whole, part = (word < jax.lax.div(exist + more, problem.pack) for more in (0, problem.pack - 1))
    return jnp.where(whole, -1, jnp.where(part, 0xFFFF, 0))


def load(problem, words, tile, index, dtype):
    """[rows, 128] of one tile of scores."""
    if problem.units == 0:
        return values_of(words[tile], dtype)
    parts = [
        words.at[tile][pl.ds(index * problem.units + unit, problem.padded, stride=problem.words), :]
        for unit in range(problem.units)
    ]
    return values_of(parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0), dtype)


def save(problem, words, tile, index, x):
    x = words_of(x)
    if problem.units == 0:
        words[tile] = x
        return
    for unit in range(problem.units):
        at = pl.ds(index * problem.units + unit, problem.padded, stride=problem.words)
        words.at[tile][at, :] = x[unit * problem.padded : (unit + 1) * problem.padded]


def kernel(qkv_ref, extras, o_ref, words, gathered, *, problem):
    heads, rows, dtype = problem.heads, problem.rows, o_ref.dtype
    tiles = heads.tiles
    where = tpu_channels.marks(heads)
    prepare(problem, qkv_ref, extras, words, gathered)

    def operand(index, which, head, other):
        x = heads.gather(lambda tile: load(problem, words, which * tiles + tile, index, dtype), head)
        return jnp.where(heads.own(head, rows), x, other)

    beside = 2 - problem.tiles % 2  # tiles of scores in one turn of the loop

    def body(first):
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        totals = [jnp.ones((rows, LANES), jnp.float32)] * beside
        work = [[(slot, head) for head in range(heads.count)] for slot in range(beside)]
        scores, weights = {}, {}
        # One tile's products run beside the softmax of the tile before and the output of the one before that.
        for starting, between, ending in zip([*work, [], []], [[], *work, []], [[], [], *work]):
            for slot, head in starting:
                q = operand(first + slot, 0, head, extras["q_code"][...])
                k = operand(first + slot, 1, head, extras["k_code"][0])
                scores[slot, head] = dot(k, q, ROWS_BY_ROWS)
            for item in between:
                x = scores.pop(item)
                weights[item] = jnp.exp2(x - x.max(0, keepdims=True)).astype(dtype)
            for slot, head in ending:
                v = operand(first + slot, 2, head, jnp.ones((), dtype))
                out = dot(weights.pop((slot, head)), v, COLUMNS_BY_COLUMNS)
                totals[slot] = jnp.where((lane & ~1) == where[head], out, totals[slot])
                put(gathered, heads, head, out, slot * tiles)
        for slot in range(beside):
            divide(first + slot, slot, totals[slot])

    def divide(index, slot, totals):
        """By the sums of the weights, all heads at once; the result takes the place of q."""
        spread = tpu_channels.split(1.0 / totals, dtype)
        for start in range(0, tiles, 2):
            width = min(2, tiles - start)
            scale = dot(spread, extras["spread"][:, start * LANES : (start + width) * LANES])
            for i in range(width):
                x = gathered[slot * tiles + start + i, :rows] * scale[:, lanes(i)]
                save(problem, words, start + i, index, x.astype(dtype))

    jax.lax.fori_loop(0, problem.tiles // beside, lambda i, _: (body(i * beside), 0)[1], 0)

    def finish(first, count):
        rows = pl.ds(pl.multiple_of(first * problem.words, problem.words), count * problem.words)
        for tile in range(tiles):
            x = values_of(words[tile, rows, :], dtype)
            at = (*frames_at(problem, first, count), slice(None), lanes(tile))
            o_ref[at] = x.reshape(count, problem.block, LANES)

    each_chunk(problem, finish)


def put(tiles, heads, head, x, start):
    """Writes the head's lanes into the tiles from `start`; heads come in order, so only lanes before it are kept."""
    tile, first, spans = heads.place(head)
    tile += start
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    at = slice(0, x.shape[0])
    tiles[tile, at] = jnp.where(lane >= first, x, tiles[tile, at]) if first else x
    if spans:
        tiles[tile + 1, at] = x
