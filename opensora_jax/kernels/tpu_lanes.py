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

from opensora_jax.kernels.spec import Unsupported

LANES = 128
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
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(lane >= first, x, read(tile + 1))

    def scatter(self, tiles: list, head: int, x):
        """Puts the head's lanes of x into the list of tiles; heads must come in order."""
        tile, first, spans = self.place(head)
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        tiles[tile] = x if tiles[tile] is None else jnp.where(lane >= first, x, tiles[tile])
        if spans:
            tiles[tile + 1] = x


def unknown_zero():
    """Zero, which the compiler does not know: what is read at it comes from memory, not from registers that were too few. It
    does know an index of a grid's axis of one; of two axes one is longer."""
    return jax.lax.shift_right_logical(pl.program_id(0) + pl.program_id(1), 30)


def at_lane(x, lane: int, value):
    """x with one lane set."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == lane, value, x)


def dot(a, b, contract=((1,), (0,))):
    """In float32; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


ROWS_BY_ROWS = ((1,), (1,))  # a b^T
COLUMNS_BY_COLUMNS = ((0,), (0,))  # a^T b


class Preparation(NamedTuple):
    """Of one head's q or k: the norm's weight [1, 128] and the rotation's tables [rows, 128], each or None.

    Neighbouring lanes are swapped by the matrix unit, in the working dtype.
    """

    weight: jax.Array | None
    cos: jax.Array | None
    sin: jax.Array | None
    norm_first: bool
    dim: int
    dtype: jnp.dtype

    def forward(self, x):
        """x: [rows, 128] float32 with zeros in the foreign lanes."""
        if self.weight is not None and self.norm_first:
            x = self._normalise(x)[0] * self.weight
        if self.cos is not None:
            x = x * self.cos + self._turn(x) * self.sin
        if self.weight is not None and not self.norm_first:
            x = self._normalise(x)[0] * self.weight
        return x

    def backward(self, x, d):
        """Gradients of x and of the weight ([rows, 128], to be summed over rows; None without a norm)."""
        if self.weight is None:
            return self._turn_back(d), None
        if self.norm_first:
            return self._normalise_backward(x, self._turn_back(d))
        if self.cos is not None:
            x = x * self.cos + self._turn(x) * self.sin
        dx, d_weight = self._normalise_backward(x, d)
        return self._turn_back(dx), d_weight

    def _turn_back(self, d):
        return d if self.cos is None else d * self.cos - self._turn(d * self.sin)

    def _normalise_backward(self, x, d):
        x, scale = self._normalise(x)
        d_weight, d = d * x, d * self.weight
        along = (d * x).sum(-1, keepdims=True) * (1.0 / self.dim)
        return (d - x * along) * scale, d_weight

    def _normalise(self, x):
        scale = jax.lax.rsqrt((x * x).sum(-1, keepdims=True) * (1.0 / self.dim) + 1e-6)
        return x * scale, scale

    def _turn(self, x):
        """(x0, x1) → (-x1, x0) of each pair of lanes."""
        source, target = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
        sign = jnp.where(source > target, -1.0, 1.0)
        return dot(x.astype(self.dtype), jnp.where(source == (target ^ 1), sign, 0.0).astype(self.dtype))


def rotation_tables(rope, rows: int):
    """(cos, sin) [row, d] as one [2, rows, 128] float32 array, zero beyond."""
    table = jnp.stack([x.astype(jnp.float32) for x in rope])
    return jnp.pad(table, ((0, 0), (0, rows - table.shape[1]), (0, LANES - table.shape[2])))


def norm_rows(heads: Heads, q_scale, k_scale):
    """The weights of both norms along the channels: [2, C] float32."""
    return jnp.stack([jnp.tile(x.astype(jnp.float32), heads.count) for x in (q_scale, k_scale)])


def norm_weight(heads: Heads, head: int, which: int, norm_ref):
    """[1, 128] of q (which = 0) or k (1) from [2, C], or None."""
    if norm_ref is None:
        return None
    return heads.gather(lambda tile: norm_ref[which : which + 1, tile * LANES : (tile + 1) * LANES], head)


def aligned(table, heads: Heads, head: int):
    """A table [rows, 128] that starts at lane 0, moved to the head's lanes."""
    shift = heads.place(head)[1]
    return pltpu.roll(table, shift, 1) if shift else table
