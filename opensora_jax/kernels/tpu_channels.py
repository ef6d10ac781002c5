"""Norm and rotation of all heads at once on a TPU, over activations as they lie ([rows, C], heads not split yet).

A head of 72 split off fills 128 lanes, so work on whole channels saves nearly half of the vector unit's instructions.
Everything fixed is folded into two tables per frame outside the kernel (weights, scale, signs of the rotation):

    y = (x * A + swap(x) * B) * r,    swap: neighbouring lanes,    r: 1 / root mean square of the head

What belongs to a head (r, later the softmax sums) lives in a [rows, 128] tile of "marks": each head owns an even lane
outside its own lanes, and the odd lane behind it. Two constant matrices of zeros and ones collect sums over heads into
the marks and spread marks back over the heads on the matrix unit; the odd lane carries what bfloat16 rounds away.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.kernels.tpu_lanes import LANES, LOG2E, OLDER, REGISTER, ROWS_BY_ROWS, Heads, dot, lanes_of


def marks(heads: Heads) -> list[int]:
    """The even lane of each head, outside its own lanes."""
    taken: list[int] = []
    for head in range(heads.count):
        foreign = ((heads.spare(head) + i) % LANES for i in range(LANES - heads.dim))
        free = (lane for lane in foreign if lane % 2 == 0 and lane not in taken)
        lane = next(free, None)
        if lane is None:
            raise Unsupported(f"{heads.count} heads of {heads.dim} leave no lanes for their sums")
        taken.append(lane)
    return taken


def spreading(heads: Heads, dtype) -> jax.Array:
    """[128, C]: marks to the lanes of their heads; its transpose collects."""
    matrix = np.zeros((LANES, heads.channels), np.float32)
    for head, lane in enumerate(marks(heads)):
        matrix[lane : lane + 2, head * heads.dim : (head + 1) * heads.dim] = 1
    return jnp.asarray(matrix, dtype)


def tables(heads: Heads, norm, rope, norm_first: bool) -> dict[str, jax.Array]:
    """A, B [2 (q, k), frames or 1, 1, C] and, where the norm comes last, its weights [2, 1, 1, C]; float32."""
    weight = _weights(scales(heads), heads, norm)
    ones = jnp.ones_like(weight)
    folded = ones if norm is not None and not norm_first else weight
    found = {}
    if rope is None:
        found["a"] = folded
    else:
        cos, sin = (jnp.tile(table.astype(jnp.float32), (1, heads.count)) for table in rope)
        found["a"] = folded * cos
        found["b"] = _swapped(folded) * (sin * _signs(heads))
    if norm is not None and not norm_first:
        found["last"] = weight
    return {name: table[:, :, None, :] for name, table in found.items()}


def tables_back(heads: Heads, norm, rope) -> dict[str, jax.Array]:
    """For gradients: weights [2, 1, 1, C] and the rotation's transpose, [1, frames, 1, C] each."""
    found = {"weight": _weights(scales_back(heads), heads, norm)}
    if rope is not None:
        cos, sin = (jnp.tile(table.astype(jnp.float32), (1, heads.count))[None] for table in rope)
        found |= {"cos": cos, "sin_back": _swapped(sin * _signs(heads))}
    return {name: table[:, :, None, :] for name, table in found.items()}


def scales(heads: Heads) -> jax.Array:
    """Of q and k: logits are powers of two."""
    return jnp.asarray([heads.dim**-0.5 * LOG2E, 1.0], jnp.float32)


def scales_back(heads: Heads) -> jax.Array:
    """Of their gradients, which kernels give of logits to base e."""
    return scales(heads) / LOG2E


def rotation(heads: Heads, table, dtype) -> jax.Array:
    """(cos, sin) [2, rows, d] of one head → [2, rows, C] for x and for swapped neighbours; as exact as the q and k that they
    turn, for in float32 those of long rows would not fit beside keys and values."""
    cos, sin = (jnp.tile(x, (1, heads.count)) for x in table)
    return jnp.stack([cos, sin * _signs(heads)]).astype(dtype)


def pairs(heads: Heads) -> list[range]:
    """Tiles of lanes, two at a time: what the matrix unit takes at once."""
    return [range(start, min(start + 2, heads.tiles)) for start in range(0, heads.tiles, 2)]


def across(pair: range) -> slice:
    """Its lanes."""
    return slice(pair[0] * LANES, (pair[-1] + 1) * LANES)


def collect(heads: Heads, spread, tile_of):
    """Sums over each head as marks; tile_of(tile): [rows, 128] of what is summed, in the working dtype."""
    sums = 0.0
    for pair in pairs(heads):
        x = jnp.concatenate([tile_of(tile) for tile in pair], 1)
        sums = sums + dot(x, spread[:, across(pair)], ROWS_BY_ROWS)
    return sums


def spread_out(heads: Heads, spread, marks, dtype, late=None):
    """tile → [rows, 128]: marks [rows, 128] (float32) over the lanes of their heads. late(): a zero that the next pair of tiles
    waits for (`tpu_lanes.once`)."""
    marked = split(marks, dtype)

    @functools.cache
    def of_pair(index):
        first = late() if late else 0
        first = first if isinstance(first, int) else pl.multiple_of(first, REGISTER)
        return dot(marked, spread[pl.ds(first, LANES), across(pairs(heads)[index])])

    return lambda tile: of_pair(tile // 2)[:, lanes_of(tile % 2)]


def root_marks(heads: Heads, tile_of, spread):
    """1 / root mean square of each head, as marks; tile_of(tile): in the working dtype."""
    sums = collect(heads, spread, lambda tile: jnp.square(tile_of(tile)))
    return jax.lax.rsqrt(sums * (1.0 / heads.dim) + 1e-6)


def _weights(scale, heads: Heads, norm):
    """[2, 1, C]: scaled weights of both norms, or the scales."""
    weight = jnp.ones((2, heads.channels), jnp.float32) if norm is None else norm
    return (weight * scale[:, None])[:, None, :]


def _signs(heads: Heads):
    return jnp.asarray(np.where(np.arange(heads.channels) % 2, 1.0, -1.0), jnp.float32)


def _swapped(table):
    """Neighbouring channels exchanged."""
    return table.reshape(*table.shape[:-1], -1, 2)[..., ::-1].reshape(table.shape)


def swap(x):
    """Neighbouring lanes exchanged; x: [rows, 128] of 32-bit words."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if x.dtype == jnp.int32 and spec.chip() in OLDER:
        # Two rotations are slower than one permutation, and the kernel 2 to 6% faster (v5e, 2026-11-30): words come one by one,
        # and fewer values wait for them.
        return jnp.where(lane & 1 == 0, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))
    return jnp.take_along_axis(x, lane ^ 1, axis=1, mode="promise_in_bounds")


def turn(x, tables):
    """By the rotation's (cos, sin), [rows, 128] float32."""
    cos, sin = tables
    return x * cos + swap(x) * sin


def turn_back(d, tables):
    cos, sin = tables
    return d * cos + swap(d * sin)


def split(x, dtype):
    """Marks with what `dtype` rounds away in the odd lanes."""
    high = x.astype(dtype).astype(jnp.float32)
    odd = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) & 1 == 1
    return jnp.where(odd, x - high, high).astype(dtype)
