"""How heads of 72 live in 128-lane tiles on a TPU, and q/k preparation there (norm, rotation, their gradients).

Activations keep their [rows, C] layout, C = heads * head_dim = whole tiles. Head h owns lanes (h*d .. h*d+d-1) modulo
128: where it spans two tiles it occupies disjoint lanes of them, so one select of the two gives the head as one aligned
[rows, 128] operand: no rotate, no pad, no permuted weights. The lanes that belong to its neighbours ("foreign") are
zeroed in q, k and gradients, and two jobs ride on them for free: a one in v makes the product with the weights return
their sum, and a large negative number in k, met by a one in q, hides a key.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Unsupported

LANES = 128
REGISTER = 16  # rows of bfloat16
# Chips that store one register at a time, and join halves of registers of bfloat16 in memory.
OLDER = ("v4", "v5e", "v5p")
LOG2E = math.log2(math.e)
HIDE = -1e9  # added to the logits (in powers of two) of hidden keys
TINY = 1e-30


class Heads(NamedTuple):
    """Where each head lies."""

    count: int
    dim: int

    @property
    def channels(self) -> int:
        return self.count * self.dim

    @property
    def tiles(self) -> int:
        return self.channels // LANES

    def check(self):
        if self.dim % 2 or self.dim > LANES - 2:
            raise Unsupported(f"head_dim {self.dim} leaves no spare lane in a tile of {LANES}")
        if self.channels % LANES:
            raise Unsupported(f"{self.channels} channels are no whole tiles of {LANES} lanes")

    def place(self, head: int) -> tuple[int, int, bool]:
        """First tile, first lane in it, does the head continue in the next tile?"""
        tile, lane = divmod(head * self.dim, LANES)
        return tile, lane, lane + self.dim > LANES

    def inside(self, tile: int) -> range:
        """Heads that have lanes in a tile."""
        return range(tile * LANES // self.dim, -(-(tile + 1) * LANES // self.dim))

    def spare(self, head: int) -> int:
        """A foreign lane."""
        return (head * self.dim + self.dim) % LANES

    def own(self, head: int, rows: int):
        """[rows, 128] bool: lanes of the head."""
        return self.within(head, jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1))

    def within(self, head: int, lane):
        _, first, spans = self.place(head)
        last = first + self.dim
        return (lane >= first) | (lane < last - LANES) if spans else (lane >= first) & (lane < last)

    @property
    def rows(self) -> int:
        """Of a head whose lanes were turned into rows: its own where they are whole sublanes, else all 128."""
        return LANES if self.dim % 8 else self.dim

    def take_rows(self, x, head: int):
        """[128, n], a head's tile transposed → its own rows, in any order that put_rows undoes."""
        if self.rows == LANES:
            return x
        _, first, spans = self.place(head)
        end = first + self.dim
        return jnp.concatenate([x[first:], x[: end - LANES]], 0) if spans else x[first:end]

    def put_rows(self, x, head: int):
        """[128, n] again, zero in foreign rows."""
        if self.rows == LANES:
            return jnp.where(self.within(head, jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)), x, 0.0)
        _, first, spans = self.place(head)
        zeros = lambda n: jnp.zeros((n, x.shape[1]), x.dtype)
        if spans:
            return jnp.concatenate([x[LANES - first :], zeros(LANES - self.dim), x[: LANES - first]], 0)
        parts = (zeros(first), x, zeros(LANES - self.dim - first))
        return jnp.concatenate([part for part in parts if part.shape[0]], 0)

    def rows_of(self, turned, head: int):
        """A head's rows, in the order of its lanes where they are its own; turned(tile) → [128, n]."""
        tile, first, spans = self.place(head)
        if self.rows != LANES:
            if not spans:
                return turned(tile)[first : first + self.dim]
            return jnp.concatenate([turned(tile)[first:], turned(tile + 1)[: first + self.dim - LANES]], 0)
        x = turned(tile)
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) >= first, x, turned(tile + 1)) if spans else x

    def turned_tile(self, ref, tile: int, columns: slice):
        """[128, n]: a tile's lanes, from the rows of all heads ([heads * rows, ..], each as rows_of gives them)."""
        if self.rows != LANES:
            return ref[tile * LANES : (tile + 1) * LANES, columns]
        found = None
        for head in self.inside(tile):
            x, first = ref[head * LANES : (head + 1) * LANES, columns], head * self.dim - tile * LANES
            lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            found = x if found is None else jnp.where(lane >= first, x, found)
        return found

    def gather(self, read, head: int):
        """[rows, 128] of the head with its neighbours in the foreign lanes; read(tile) → [rows, 128]."""
        tile, first, spans = self.place(head)
        x = read(tile)
        if not spans:
            return x
        return choose(lambda lane: lane >= first, x, read(tile + 1))

    def scatter(self, tiles: list, head: int, x):
        """Puts the head's lanes of x into the list of tiles; heads must come in order."""
        tile, first, spans = self.place(head)
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        tiles[tile] = x if tiles[tile] is None else jnp.where(lane >= first, x, tiles[tile])
        if spans:
            tiles[tile + 1] = x


def unknown_zero(axes: int):
    """Zero, which the compiler does not know: what is read at it comes from memory, not from registers that were too few. It
    does know an index of a grid's axis of one; of all axes some are longer."""
    return jax.lax.shift_right_logical(sum(map(pl.program_id, range(axes))), 30)


def hold(ref, at: tuple, x, zero):
    """Writes x to ref[at], as words, and gives the function that reads it. The mask is zero == 0, which the compiler does not
    know (`unknown_zero`): what it knows to be in memory it keeps in registers too, and spills them when they are too few."""
    words = words_of(x)
    # Pallas' interpreter takes no plain numbers beside a mask.
    there = ref.at[tuple(pl.ds(i, 1) if isinstance(i, int) else i for i in at)]
    kept = jax.lax.bitcast_convert_type(words, ref.dtype).reshape(there.shape)
    pltpu.store(there, kept, mask=jnp.full(there.shape, zero) == 0)
    return lambda: values_of(jax.lax.bitcast_convert_type(there[...].reshape(words.shape), words.dtype), x.dtype)


def once(made: list, ago: int, zero, share=1.0):
    """Zero, known once so much (of its rows) of what was made so many steps ago is: what is read at an address that it is added
    to waits for that. In a straight line the compiler makes what waits for nothing long before its turn, and spills it (v6e,
    2026-12-01). made: float32, [rows, lanes] each; while they are fewer, nothing waits. zero: `unknown_zero`. Scalars come in the
    order of the program: one that is late must not be asked for early."""
    if len(made) < ago:
        return 0
    x = made[-ago]
    return jax.lax.bitcast_convert_type(x[int(share * (len(x) - 1)), 0], jnp.int32) & zero


def choose(inside, x, other):
    """x in lanes where inside(lane), else the other: as words, of which there are fewer, where the chip has them so."""
    if spec.chip() in OLDER:
        return jnp.where(inside(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)), x, other)
    x_words, other_words = words_of(x), words_of(other)
    chosen = inside(jax.lax.broadcasted_iota(jnp.int32, x_words.shape, 1))
    return values_of(jnp.where(chosen, x_words, other_words), x.dtype)


def word(itemsize: int):
    """The type of words of values of so many bytes."""
    return jnp.float32 if itemsize == 4 else jnp.int32


def words_of(x):
    """Whole registers of 32 bits: float32 as it is, of bfloat16 two rows in one."""
    return x if x.dtype == jnp.float32 else pltpu.bitcast(x, jnp.int32)


def values_of(words, dtype):
    return words if dtype == jnp.float32 else pltpu.bitcast(words, dtype)


def lanes_of(tile: int) -> slice:
    return slice(tile * LANES, (tile + 1) * LANES)


def at_lane(x, lane: int, value):
    """x with one lane set."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == lane, value, x)


def dot(a, b, contract=((1,), (0,))):
    """In float32; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


ROWS_BY_ROWS = ((1,), (1,))  # a b^T
COLUMNS_BY_COLUMNS = ((0,), (0,))  # a^T b


def rotation_tables(rope, rows: int):
    """(cos, sin) [row, d] as one [2, rows, d] float32 array, zero beyond."""
    table = jnp.stack([x.astype(jnp.float32) for x in rope])
    return jnp.pad(table, ((0, 0), (0, rows - table.shape[1]), (0, 0)))


def norm_rows(heads: Heads, q_scale, k_scale):
    """The weights of both norms along the channels: [2, C] float32."""
    return jnp.stack([jnp.tile(x.astype(jnp.float32), heads.count) for x in (q_scale, k_scale)])
