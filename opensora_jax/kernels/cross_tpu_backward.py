"""Backward pass of cross-attention on TPUs (cross_tpu.py): grid (sample, block of queries).

Nothing is kept of the forward pass: text is so short that all weights of a tile of queries fit in fast memory. A tile, the
queries of one head, passes through the stages of `_Tile`, each beside the stage before of the tile that follows; what waits
for the next stage lies in memory (`tpu_lanes.hold`), not in registers that spill. Scores are [keys, queries]; the products
behind them stream a head's transposed channels past weights and slopes, as in tpu_slopes.py. Gradients of keys and values
gather in fast memory over the blocks and leave with the last one.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, spec
from opensora_jax.kernels.tpu_lanes import (
    HIDE,
    LANES,
    LOG2E,
    OLDER,
    REGISTER,
    ROWS_BY_ROWS,
    Heads,
    choose,
    dot,
    hold,
    lanes_of,
    unknown_zero,
    values_of,
    word,
)
from opensora_jax.kernels.tpu_rows import (
    CHUNK,
    existing,
    extra_specs,
    hide_keys,
    hides_keys,
    own_float,
    reader,
    rows_inside,
    rows_shown,
    rows_valid,
    with_zeros,
)
from opensora_jax.kernels.tpu_slopes import cuts, pipeline

QUERY_TILE = 256
IN_FLIGHT = 4  # tiles whose scores are not read for the last time


def gradients(q, k, v, extras, d_out, problem):
    """Of q, k and v. Samples of the text may be fewer: they serve over and over again."""
    heads, padded, block = problem.heads, problem.padded, problem.block_backward
    (batch, queries, channels), (samples, keys, _) = q.shape, k.shape
    # Twice k, v and their gradients, unless they then take more than a quarter of the memory.
    twice = 8 * padded * channels * q.dtype.itemsize <= blocks.vmem() // 4
    of_text = functools.partial(pl.BlockSpec, (1, padded, channels), pipeline_mode=None if twice else pl.Buffered(1))
    some = pl.BlockSpec((1, block, channels), lambda b, i: (b, i, 0))
    text, whole = of_text(lambda b, i: (jax.lax.rem(b, samples), 0, 0)), of_text(lambda b, i: (b, 0, 0))
    d_text = jax.ShapeDtypeStruct((batch, keys, channels), k.dtype)
    in_lanes = pltpu.VMEM((heads.count, padded, LANES), q.dtype)
    turned = lambda rows, dtype: pltpu.VMEM((channels, rows), dtype)
    waiting = pltpu.VMEM((IN_FLIGHT, problem.used, QUERY_TILE), jnp.float32)
    scratch = {"keys": in_lanes, "values": in_lanes, "k_t": turned(padded, q.dtype)}
    in_words = pltpu.VMEM((channels * q.dtype.itemsize // 4, block), word(q.dtype.itemsize))
    scratch |= {"q_t": in_words, "do_t": in_words}
    scratch |= {"weights": waiting, "d_weights": waiting}
    scratch |= {"d_q": turned(block, jnp.float32)} | dict.fromkeys(("d_k", "d_v"), turned(padded, jnp.float32))
    d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_kernel, problem=problem, queries=queries),
        grid=(batch, -(-queries // block)),
        in_specs=[some, text, text, some, extra_specs(extras, problem)],
        out_specs=[some, whole, whole],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), d_text, d_text],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="cross_backward",
    )(q, k, v, d_out, extras)
    if batch > samples:
        add = lambda d: d.reshape(-1, *k.shape).astype(jnp.float32).sum(0).astype(d.dtype)
        d_k, d_v = add(d_k), add(d_v)
    return d_q, d_k, d_v


def _kernel(q_ref, k_ref, v_ref, do_ref, extras, dq_ref, dk_ref, dv_ref, scratch, *, problem, queries):
    heads, block, index = problem.heads, problem.block_backward, pl.program_id(1)

    @pl.when(index == 0)
    def _open():
        for at in cuts(problem.padded, CHUNK):
            _prepare_text(problem, k_ref, v_ref, extras, at, scratch)
        for total in (scratch["d_k"], scratch["d_v"]):
            total[...] = jnp.zeros_like(total)

    if queries % block:

        @pl.when(index == pl.num_programs(1) - 1)
        def _clear():
            """Beyond the last query anything may lie, even NaN."""
            exist = rows_inside(block, queries, index * block)
            for ref, tile in itertools.product((q_ref, do_ref), range(heads.tiles)):
                ref[0, :, lanes_of(tile)] = existing(ref[0, :, lanes_of(tile)], exist)

    shared = _Block(problem, hides_keys(problem, extras), unknown_zero(2), q_ref, do_ref, dq_ref, scratch)
    every = itertools.product(range(heads.count), cuts(block, QUERY_TILE))
    tiles = [(_Tile(shared, head, at, n % IN_FLIGHT),) for n, (head, at) in enumerate(every)]
    # Products of one tile take less time than they are under way (v6e, 2026-12-01: 6% of 120 keys); where one register is
    # stored at a time, waiting costs 6%.
    wait = [] if spec.chip() in OLDER else [lambda tile: None]
    pipeline(tiles, _Tile.start, *wait, _Tile.soften, _Tile.finish, _Tile.give)

    @pl.when(index == pl.num_programs(1) - 1)
    def _close():
        for at, tile in itertools.product(cuts(problem.padded, CHUNK), range(heads.tiles)):
            d_k, d_v = (scratch[name][lanes_of(tile), at] for name in ("d_k", "d_v"))
            for ref, x in ((dk_ref, d_k * (problem.scale / LOG2E)), (dv_ref, d_v)):
                ref[0, at, lanes_of(tile)] = x.astype(ref.dtype).T


def _prepare_text(problem, k_ref, v_ref, extras, at: slice, scratch):
    """Keys and values of each head, zero in the lanes of its neighbours, which q and do therefore may bring; keys transposed."""
    heads, dtype, rows = problem.heads, k_ref.dtype, at.stop - at.start
    exist = rows_valid(problem, at)
    shown = rows_shown(problem, extras, exist, at)
    k, v = (reader(ref, 0, heads, (0, at)) for ref in (k_ref, v_ref))
    for tile in range(heads.tiles):
        x = existing(k(tile), exist).astype(jnp.float32) * (problem.scale / LOG2E)
        scratch["k_t"][lanes_of(tile), at] = x.astype(dtype).T
    for head in range(heads.count):
        x = own_float(k, heads, head, rows, exist) * problem.scale
        scratch["keys"][head, at] = hide_keys(x, head, problem, extras, exist, at).astype(dtype)
        scratch["values"][head, at] = own_float(v, heads, head, rows, shown).astype(dtype)


class _Block(NamedTuple):
    """What all tiles of a block of queries share."""

    problem: Any
    hides: bool
    zero: Any
    q_ref: Any
    do_ref: Any
    dq_ref: Any
    scratch: dict


class _Tile:
    """Some queries of one head, from stage to stage."""

    def __init__(self, block: _Block, head: int, at: slice, slot: int):
        self.block, self.head, self.at, self.slot = block, head, at, slot
        self.heads: Heads = block.problem.heads
        self.dtype = block.q_ref.dtype

    def start(self):
        """Scores, and gradients of weights."""
        for tile in self._tiles_that(begin=True):
            for ref, name in ((self.block.q_ref, "q_t"), (self.block.do_ref, "do_t")):
                there = self._in_words(lanes_of(tile)), self.at
                hold(self.block.scratch[name], there, ref[0, self.at, lanes_of(tile)].T, self.block.zero)
        q, do = (
            self.heads.gather(reader(ref, 0, self.heads, (0, self.at)), self.head)
            for ref in (self.block.q_ref, self.block.do_ref)
        )
        if self.block.hides:
            q = choose(lambda lane: lane == self.heads.spare(self.head), jnp.ones_like(q), q)
        scores, d_weights = (
            dot(self.block.scratch[name][self.head, : self.block.problem.used], x, ROWS_BY_ROWS)
            for name, x in (("keys", q), ("values", do))
        )
        self.peak = scores.max(0, keepdims=True)
        self.scores, self.d_weights = self._hold("weights", scores), self._hold("d_weights", d_weights)

    def soften(self):
        """Weights and what divides them, and the slope that a query's weights share; none where no key is seen."""
        weights = jnp.exp2(self.scores() - self.peak)
        self.part = jnp.where(self.peak > HIDE / 2, 1.0 / weights.sum(0, keepdims=True), 0.0)
        self.shared = (weights * self.d_weights()).sum(0, keepdims=True) * self.part
        self.weights = self._hold("weights", weights)

    def finish(self):
        """Gradients of v, k and q, transposed."""
        scratch, window = self.block.scratch, self._window
        weights = self.weights()
        # Each from what lies in memory: divided weights would wait in registers for the second use.
        divided, slopes = weights * self.part, weights * ((self.d_weights() - self.shared) * self.part)
        divided, slopes = (with_zeros(x.astype(self.dtype), self.block.problem.padded) for x in (divided, slopes))
        for total, x, y in (("d_v", "do_t", divided), ("d_k", "q_t", slopes)):
            x = values_of(scratch[x][self._in_words(window), self.at], self.dtype)
            self._put(total, slice(None), dot(x, y, ROWS_BY_ROWS), add=True)
        self._put("d_q", self.at, dot(scratch["k_t"][window], slopes))

    def give(self):
        for tile in self._tiles_that(begin=False):
            x = self.block.scratch["d_q"][lanes_of(tile), self.at]
            self.block.dq_ref[0, self.at, lanes_of(tile)] = x.astype(self.dtype).T

    @property
    def _window(self) -> slice:
        """The head's channels in whole registers, with some of its neighbours'."""
        first = self.head * self.heads.dim
        return slice(first // REGISTER * REGISTER, -(-(first + self.heads.dim) // REGISTER) * REGISTER)

    def _tiles_that(self, begin: bool) -> list[int]:
        """Tiles of lanes in which this head is the first of all, or the last."""
        which = 0 if begin else -1
        return [tile for tile in range(self.heads.tiles) if self.heads.inside(tile)[which] == self.head]

    def _in_words(self, rows: slice) -> slice:
        pack = 4 // self.dtype.itemsize
        return slice(rows.start // pack, rows.stop // pack)

    def _hold(self, name: str, x):
        return hold(self.block.scratch[name], (self.slot, slice(len(x)), slice(x.shape[1])), x, self.block.zero)

    def _put(self, name: str, at: slice, x, add: bool = False):
        """Writes the head's own rows of its window, or adds them."""
        ref, window, first = self.block.scratch[name], self._window, self.head * self.heads.dim
        own = slice(first, first + self.heads.dim)
        x = x[own.start - window.start : own.stop - window.start]
        hold(ref, (own, at), ref[own, at] + x if add else x, self.block.zero)
