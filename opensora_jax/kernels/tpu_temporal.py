"""What both passes of temporal attention on a TPU share: a block of all frames of some neighbouring positions.

A block lies in fast memory as 32-bit words, two bfloat16 positions each, in which a load with a stride picks one pair of
positions over time; a tile of scores is a few such loads. q and k are normalised and rotated on whole channels
(tpu_channels.py), some frames at once. Positions of one tile hide each other inside the product: the lanes of q that
belong to other heads carry the bits of its position, those of k a penalty for each bit that differs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import spec, tpu_channels, tpu_lanes
from opensora_jax.kernels.tpu_lanes import (
    LANES,
    OLDER,
    Heads,
    hold,
    lanes_of,
    unknown_zero,
    values_of,
    words_of,
)

TILE_ROWS = 128  # of scores, about; static schedules of v5e and v6e prefer it in both passes (2026-11-29)
CHUNK_ROWS = 512  # normalised and rotated at once; half as many where more than 64 frames leave a v5p little room
PERIOD = 8  # lanes of a position's code: four bits and their complements, so 16 positions a tile
FAR = -1e9
FORTH = ("a", "b")  # names of the tables that turn q and k


class Problem(NamedTuple):
    """The static part of a call."""

    heads: Heads
    frames: int
    positions: int
    block: int  # neighbouring positions of one program
    itemsize: int
    norm_first: bool
    pieces: int  # of the frames, one behind the other
    interpret: bool

    @property
    def piece(self) -> int:
        """Frames of one piece."""
        return self.frames // self.pieces

    def of_program(self, n: int, **options) -> pl.BlockSpec:
        """All frames of some positions, n * C lanes of [pieces, B, T / pieces, S, ..]."""
        shape = (self.pieces, 1, self.piece, self.block, n * self.heads.channels)
        return pl.BlockSpec(shape, lambda i, j: (0, i, 0, j, 0), **options)

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
        """Words of one frame of the block."""
        return self.block // self.pack

    @property
    def pitch(self) -> int:
        """From one frame's words to the next one's, a load's stride: odd, for eights would meet half of the memory's banks, and
        take two loads."""
        return self.words if self.units == 0 else self.words + 1

    @property
    def rows(self) -> int:
        """Rows of one tile."""
        return self.frames * self.block if self.units == 0 else self.units * self.padded * self.pack

    @property
    def tiles(self) -> int:
        return 1 if self.units == 0 else self.words // self.units

    @property
    def units(self) -> int:
        """Strided loads of one tile; 0: the block is one tile as it lies."""
        if self.frames * self.block <= TILE_ROWS:
            return 0
        one = -(-self.frames // 8) * 8 * self.pack
        fitting = range(max(1, min(self.words, TILE_ROWS // one)), 0, -1)
        return next(n for n in fitting if self.words % n == 0)

    @property
    def long(self) -> bool:
        """Does one row fill more than a tile?"""
        return self.rows > TILE_ROWS

    @property
    def beside(self) -> int:
        """Tiles in one turn of the loop over them; of two, long rows would spill more than a v5p has room for."""
        return 1 if self.long else 2 - self.tiles % 2

    @property
    def items(self) -> int:
        """Heads of the tiles beside each other."""
        return self.beside * self.heads.count

    def stages(self, together: int):
        """(starting, in the middle, ending): each a list of (which of the tiles beside each other, head), so many at once."""
        every = [divmod(item, self.heads.count) for item in range(self.items)]
        work = [every[start : start + together] for start in range(0, len(every), together)]
        return zip([*work, [], []], [[], *work, []], [[], [], *work])

    @property
    def word(self):
        return tpu_lanes.word(self.itemsize)

    @property
    def halves(self) -> bool:
        """Do half-filled registers of bfloat16 stay apart?"""
        return self.pack > 1 and spec.chip() in OLDER

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS if self.frames <= 64 else CHUNK_ROWS // 2

    def scratch(self, arrays: int) -> list:
        """Of so many arrays of C channels as words; and of q and k of a chunk in float32."""
        tiles = self.heads.tiles
        waiting = pltpu.VMEM((tiles, max(self.chunk_rows, self.block), LANES), jnp.float32)
        return [pltpu.VMEM((arrays * tiles, self.padded * self.pitch, LANES), self.word), [waiting, waiting]]

    def held(self, count: int, *shape: int, dtype) -> list:
        """For `Block.hold`: so many, but no more than items."""
        return [pltpu.VMEM(shape, dtype)] * min(count, self.items)

    def frame_of_row(self) -> np.ndarray:
        row = np.arange(self.rows)
        return row // self.block if self.units == 0 else row // self.pack % self.padded

    def position_of_row(self) -> np.ndarray:
        row = np.arange(self.rows)
        if self.units == 0:
            return row % self.block
        return row // (self.padded * self.pack) * self.pack + row % self.pack


def operands(problem, dtype, norm, rope, seen):
    """What a kernel needs beside its arrays: tables, and codes of the lanes that belong to other heads, of q [rows, 128] and
    of k [B or 1, rows, 128]. seen: [B, T] or None."""
    heads = problem.heads
    position, frame = problem.position_of_row(), problem.frame_of_row()
    lane = np.arange(LANES) % PERIOD
    bit = (position[:, None] >> lane // 2 & 1) == lane % 2
    shown = jnp.asarray(frame < problem.frames)[None]
    if seen is not None:
        shown = shown & (seen[:, np.minimum(frame, problem.frames - 1)] > 0)
    hidden = ~(jnp.asarray(bit)[None] & shown[:, :, None])
    extras = tpu_channels.tables(heads, norm, rope, problem.norm_first)
    extras |= {"spread": tpu_channels.spreading(heads, dtype)}
    return extras | {"q_code": _words_where(jnp.asarray(bit), 1.0, dtype), "k_code": _words_where(hidden, FAR, dtype)}


def _words_where(there, value: float, dtype):
    """The value or zero, [.., rows, 128], as words: two rows each of bfloat16. By hand, for XLA folds a bitcast of constants
    wrongly on a CPU (jax 0.10.2, 2026-11-29)."""
    if dtype == jnp.float32:
        return jnp.where(there, value, 0.0)
    bits = int(np.asarray(value, jnp.bfloat16).view(np.uint16))
    low, high = (jnp.where(there[..., row::2, :], jnp.uint32(bits << 16 * row), jnp.uint32(0)) for row in range(2))
    return (low | high).astype(jnp.int32)


def specs_of(extras, **options):
    """Where they lie: all of each, but of a sample's own codes."""
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim, **options)
    specs = {key: whole(x) for key, x in extras.items()}
    if extras["k_code"].shape[0] > 1:
        specs["k_code"] = pl.BlockSpec((1, *extras["k_code"].shape[1:]), lambda i, j: (i, 0, 0))
    return specs


def eights(words):
    """[n, 128] as whole registers."""
    return words.reshape(-1, 8, LANES)


class Chunk(NamedTuple):
    """Some frames of a block."""

    first: jax.Array | int
    count: int
    repeated: jax.Array | int = 0  # frames at its start that were in the chunk before


class Block:
    """One program's positions as words [arrays * tiles, frames * pitch, 128]."""

    def __init__(self, problem: Problem, extras, words, waiting, dtype):
        self.problem, self.heads, self.extras, self.dtype = problem, problem.heads, extras, dtype
        self.words, self.waiting = words, waiting
        self.exist = problem.positions - pl.program_id(1) * problem.block  # positions from the first one on
        self.zero = unknown_zero(2)
        self.halves = problem.halves
        self.plain = not extras["norm"] and "b" not in extras  # q is scaled, and nothing else is changed
        self.lane = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 1)

    def each_chunk(self, body):
        """body(chunk) over all frames, never across pieces."""
        problem = self.problem
        count = -(-problem.frames // -(-problem.frames * problem.block // problem.chunk_rows))
        while problem.pieces > 1 and problem.piece % count:
            count -= 1
        chunks = -(-problem.frames // count)
        if chunks == 1:
            return body(Chunk(0, count))

        def run(i, carry):
            first = jnp.minimum(i * count, problem.frames - count)
            body(Chunk(first, count, i * count - first if problem.frames % count else 0))
            return carry

        jax.lax.fori_loop(0, chunks, run, 0)

    def each_tile(self, body):
        """body(the first of the tiles that lie beside each other)."""
        turns, beside = self.problem.tiles // self.problem.beside, self.problem.beside
        if turns == 1:
            return body(0)
        jax.lax.fori_loop(0, turns, lambda i, _: (body(i * beside), 0)[1], 0)

    def rows_at(self, chunk: Chunk):
        """Its rows of single positions."""
        block = self.problem.block
        return pl.ds(pl.multiple_of(chunk.first * block, block), chunk.count * block)

    def _at(self, chunk: Chunk, first: int = 0, count: int | None = None):
        """Where so many words of each of its frames lie, from the first one on."""
        count, pitch = count or self.problem.words, self.problem.pitch
        if count == pitch:
            return [pl.ds(pl.multiple_of(chunk.first * count, count), chunk.count * count)]
        return [pl.ds((chunk.first + frame) * pitch + first, count) for frame in range(chunk.count)]

    def _words(self, tile: int, chunk: Chunk):
        parts = [self.words[tile, at] for at in self._at(chunk)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)

    def _lay(self, tile: int, chunk: Chunk, words, first: int = 0):
        """words: as many of each frame, from the first one on."""
        places = self._at(chunk, first, len(words) // chunk.count)
        for place, part in zip(places, words.reshape(len(places), -1, LANES)):
            self.words[tile, place] = part

    def frames_at(self, chunk: Chunk):
        """Where its frames lie in a block of [pieces, 1, frames of a piece, ..]."""
        if self.problem.pieces == 1:
            return 0, 0, pl.ds(chunk.first, chunk.count)
        piece = jax.lax.div(chunk.first, self.problem.piece)
        return piece, 0, pl.ds(chunk.first - piece * self.problem.piece, chunk.count)

    def clear(self, refs):
        """Zero beyond the last position, where the last block may hold anything, even NaN. Where the inputs lie: masks of
        every block took 5% of a forward pass (v6e, 2026-11-30)."""
        if self.problem.positions % self.problem.block == 0:
            return

        @pl.when(self.exist < self.problem.block)
        def last():
            self.each_chunk(functools.partial(self._clear, refs))

    def _clear(self, refs, chunk: Chunk):
        problem, at = self.problem, (*self.frames_at(chunk), slice(None))
        word = jax.lax.broadcasted_iota(jnp.int32, (problem.words, LANES), 0)
        whole, part = (word < jax.lax.div(self.exist + more, problem.pack) for more in (0, problem.pack - 1))
        for there in (ref.at[(*at, lanes_of(tile))] for ref in refs for tile in range(ref.shape[-1] // LANES)):
            x = words_of(there[...].reshape(-1, LANES)).reshape(chunk.count, problem.words, LANES)
            x = jnp.where(whole, x, 0.0) if problem.pack == 1 else x & jnp.where(whole, -1, jnp.where(part, 0xFFFF, 0))
            there[...] = values_of(x.reshape(-1, LANES), self.dtype).reshape(there.shape)

    def fetch(self, ref, tile: int, chunk: Chunk, to: int):
        """Into words."""
        step = 8 if self.halves else self.problem.block
        for start in range(0, self.problem.block, step):
            x = ref[(*self.frames_at(chunk), pl.ds(start, step), lanes_of(tile))]
            self._lay(to, chunk, words_of(x.reshape(-1, LANES)), start // self.problem.pack)

    def write(self, ref, tile: int, chunk: Chunk, words):
        x = values_of(words, self.dtype).reshape(chunk.count, self.problem.block, LANES)
        ref[(*self.frames_at(chunk), slice(None), lanes_of(tile))] = x

    def give(self, ref, tiles, chunk: Chunk):
        """Some tiles as they are."""
        for tile in tiles:
            self.write(ref, tile, chunk, self._words(tile, chunk))

    def times(self, x, name: str, which: int, tile: int, chunk: Chunk):
        """x [rows, 128] by a table of [2 or 1, frames or 1, 1, C]."""
        table = self.extras[name]
        frames = pl.ds(chunk.first, chunk.count) if table.shape[1] > 1 else slice(None)
        table = table[which % table.shape[0], frames, :, lanes_of(tile)]
        return (x.reshape(chunk.count, self.problem.block // 8, 8, LANES) * table[:, None]).reshape(x.shape)

    def turned(self, tile_of, names: tuple[str, str], which: int, chunk: Chunk):
        """tile → `mix` of what lies as it came, tile_of(tile). All of it is swapped first, and waits in memory, not in
        registers beside what it is added to; chips with one store at a time swap as they go."""
        swap = lambda tile: values_of(tpu_channels.swap(words_of(tile_of(tile))), self.dtype)
        held = {}
        for tile in range(self.heads.tiles if names[1] in self.extras and not self.halves else 0):
            x = swap(tile)
            held[tile] = hold(self.waiting[which], (tile, slice(len(x) // self.problem.pack)), x, self.zero)

        def found(tile):
            swapped = None
            if names[1] in self.extras:
                swapped = (held[tile]() if held else swap(tile)).astype(jnp.float32)
            return self.mix(tile_of(tile).astype(jnp.float32), swapped, names, which, tile, chunk)

        return found

    def mix(self, x, swapped, names: tuple[str, str], which: int, tile: int, chunk: Chunk):
        """x A + swapped B by two tables; where one is missing, x and nothing."""
        straight, other = (name in self.extras for name in names)
        found = self.times(x, names[0], which, tile, chunk) if straight else x
        return found + self.times(swapped, names[1], which, tile, chunk) if other else found

    def hold(self, there: list, item: int, *values):
        """Writes them to memory, in turn with other items, and gives the function that reads them."""
        if not there:
            return lambda: values
        ref = there[item % len(there)]
        found = [hold(ref, (i,), x, self.zero) for i, x in enumerate(values)]
        return lambda: [read() for read in found]

    def collect(self, tile_of):
        return tpu_channels.collect(self.heads, self.extras["spread"], tile_of)

    def spread(self, marks, late=None):
        """tile → [rows, 128]: marks (float32) over the lanes of their heads."""
        return tpu_channels.spread_out(self.heads, self.extras["spread"], marks, self.dtype, late)

    def prepare(self, refs, roots=None):
        """Everything into words; q and k normalised and rotated. roots: keeps 1 / root mean square as float32 marks."""
        self.clear(refs)
        self.each_chunk(functools.partial(self._prepare, refs=refs, roots=roots))
        problem = self.problem
        used = problem.frames * problem.pitch
        for tile in range(self.words.shape[0] if problem.padded != problem.frames else 0):
            self.words[tile, used:, :] = jnp.zeros((self.words.shape[1] - used, LANES), self.words.dtype)

    def _prepare(self, chunk: Chunk, refs, roots):
        tiles, rows = self.heads.tiles, self.rows_at(chunk)
        every = [(ref, tile) for ref in refs for tile in range(ref.shape[-1] // LANES)]
        for index, (ref, tile) in enumerate(every):
            if self.plain and index < tiles:  # read once
                x = ref[(*self.frames_at(chunk), slice(None), lanes_of(tile))].reshape(-1, LANES)
                self.put(0, tile, chunk, self.times(x.astype(jnp.float32), "a", 0, tile, chunk))
            else:
                self.fetch(ref, tile, chunk, index)
        if self.plain:
            return
        if not self.extras["norm"]:
            for which in range(2):
                turned = self.turned(self.reader(which, chunk), FORTH, which, chunk)
                for tile in range(tiles):
                    self.put(which, tile, chunk, turned(tile))
            return

        waiting = {}
        lying = [self.reader(which, chunk) for which in range(2)]
        turned = [self.turned(lying[which], FORTH, which, chunk) for which in range(2)]

        def squares(which, tile):
            x = turned[which](tile)
            waiting[which, tile] = hold(self.waiting[which], (tile, slice(rows.size)), x, self.zero)
            return jnp.square(x.astype(self.dtype) if "last" in self.extras else lying[which](tile))

        sums = [self.collect(functools.partial(squares, which)) for which in range(2)]
        found = [jax.lax.rsqrt(x * (1.0 / self.heads.dim) + 1e-6) for x in sums]
        for which in range(2):
            if roots is not None:
                roots[which, rows] = found[which]
            root = self.spread(found[which])
            for tile in range(tiles):
                x = waiting[which, tile]() * root(tile)
                x = self.times(x, "last", which, tile, chunk) if "last" in self.extras else x
                self.put(which, tile, chunk, x)

    def reader(self, array: int, chunk: Chunk):
        """tile → [rows, 128] of q (0), k (1) or what lies behind them."""
        return lambda tile: values_of(self._words(array * self.heads.tiles + tile, chunk), self.dtype)

    def put(self, which: int, tile: int, chunk: Chunk, x):
        to = which * self.heads.tiles + tile
        if not self.halves:
            return self._lay(to, chunk, words_of(x.astype(self.dtype)))
        for first, part in self._parts(x):
            frame, word = divmod(first, self.problem.words)
            self._lay(to, Chunk(chunk.first + frame, 1), part, word)

    def load(self, tile: int, index):
        """[rows / pack / 8, 8, 128] of one tile of scores, as words."""
        problem = self.problem
        if problem.units == 0:
            return eights(self.words[tile])
        parts = [self.words.at[tile][self._unit(index, unit), :] for unit in range(problem.units)]
        return eights(parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0))

    def save(self, array: int, index, results):
        """In the place of one of the arrays: what each head gave, [rows, 128] each."""
        problem, heads = self.problem, self.heads
        results = [eights(x if self.halves else words_of(x.astype(self.dtype))) for x in results]
        for tile in range(heads.tiles):
            inside = heads.inside(tile)
            x = results[inside[0]]
            for head in inside[1:]:
                x = jnp.where(self.lane >= head * heads.dim - tile * LANES, results[head], x)
            x, tile = x.reshape(-1, LANES), array * heads.tiles + tile
            for first, part in self._parts(x):
                if problem.units == 0:
                    self.words[tile, first : first + len(part)] = part
                else:
                    unit, first = divmod(first, problem.padded)
                    self.words.at[tile][self._unit(index, unit, first, len(part)), :] = part

    def _parts(self, x):
        """(first word, words) of what is stored at once, of x [rows, 128]: float32 where halves stay apart, else words."""
        if not self.halves:
            step = self.problem.padded if self.problem.units else len(x)
            return [(first, x[first : first + step]) for first in range(0, len(x), step)]
        pack = self.problem.pack
        return [(row // pack, words_of(x[row : row + 8].astype(self.dtype))) for row in range(0, len(x), 8)]

    def _unit(self, index, unit: int, first: int = 0, count: int | None = None):
        """So many frames from the first one on."""
        problem = self.problem
        start = index * problem.units + unit + first * problem.pitch
        return pl.ds(start, count or problem.padded, stride=problem.pitch)

    def operand(self, index, which: int, head: int, other=None):
        """[rows, 128] of a head; `other`, as words, in the lanes of other heads, or what lies there."""
        heads = self.heads
        tile, first, spans = heads.place(head)
        tile += which * heads.tiles
        x = self.load(tile, index)
        x = jnp.where(self.lane >= first, x, self.load(tile + 1, index)) if spans else x
        x = x if other is None else jnp.where(heads.within(head, self.lane), x, eights(other))
        return values_of(x.reshape(-1, LANES), self.dtype)
