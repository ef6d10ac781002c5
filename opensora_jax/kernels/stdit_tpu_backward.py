"""Backward pass of the spatial kernel (stdit_tpu.py): grid (row); scores are recomputed tile by tile (tpu_slopes.py).

Short rows are one straight line of tiles over all heads; in longer ones the blocks of queries are a loop.

Where q and k are normalised or rotated, that comes first, on whole channels. At the end the gradients of all heads go back
through rotation and norm, on whole channels too. With u what is normalised, g the gradient of what comes out of the norm,
w its weight and r = 1 / root mean square of a head:

    du = r w g - u (r^3 / dim) sum(w g u),    dw = sum(r g u)

the sums over a head being marks (tpu_channels.py). Rotation stands before or behind.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, spec, tpu_channels, tpu_slopes
from opensora_jax.kernels.spec import Call
from opensora_jax.kernels.tpu_lanes import LANES, LOG2E, OLDER, hold, lanes_of, once, unknown_zero, word
from opensora_jax.kernels.tpu_rows import (
    CHUNK,
    chunk_of_a_row,
    each_chunk,
    existing,
    extra_bytes,
    extra_specs,
    first_rows,
    prepared,
    reader,
    row_sizes,
    rows_inside,
    rows_shown,
    turning,
    whole_channels,
    whole_row,
)

STRAIGHT = 1024  # tokens of a padded row
SHORT = 512  # the same: operands wait, `_late` and in memory; in rows of 1,024 no fewer registers would spill (v6e, 2026-12-01)
EARLY = 0.5  # share of a tile's exponents
WAITING = 4  # tiles of weights and slopes, blocks of transposed operands


def least_bytes(call: Call) -> int:
    """Of fast memory."""
    return _bytes(*row_sizes(call), buffers=1)


def _bytes(padded: int, channels: int, itemsize: int, extra: int, buffers: int) -> int:
    """Not less than the compiler asks for, a token of heads of 72 in bfloat16, what it spills included (2026-11-30): 53.8 kB of
    a straight line of 1,024 with norm and rotation, 28.3 of 2,432 rows with both, 22.9 of 2,944 plain ones."""
    moving = buffers * (8 * channels + LANES) * itemsize  # qkv, the result and their gradients, logarithms
    at_work = (32_000 if padded <= STRAIGHT else 5_120) * itemsize // 2
    return padded * (moving + at_work + extra) + 4 * CHUNK * channels


def gradients(qkv, extras, d_out, out, logs, problem):
    """Of qkv and, where there is a norm, of its weights [2, C]. logs: [pieces, rows, .., 128], the forward pass's."""
    heads, rows, c3 = problem.heads, qkv.shape[1], qkv.shape[3]
    padded = max(problem.padded, -(-problem.size // problem.block_backward) * problem.block_backward)
    extra = extra_bytes(c3 // 3, qkv.dtype.itemsize, "rope" in extras, "hidden" in extras)
    double = _bytes(padded, c3 // 3, qkv.dtype.itemsize, extra, buffers=2) <= blocks.vmem()
    single = {} if double else {"pipeline_mode": pl.Buffered(1)}
    row = lambda width: pl.BlockSpec(whole_row(problem, padded, width), lambda i: (0, i, 0, 0), **single)
    out_specs, out_shape = [row(c3)], [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    newer = spec.chip() not in OLDER
    short = newer and problem.padded <= min(SHORT, STRAIGHT)
    # Where heads share one, a head's sums are read early, for another's, and spill.
    total = lambda rows: pltpu.VMEM((heads.count if short else 2, heads.rows, rows), jnp.float32)
    words = lambda n, rows, lanes: pltpu.VMEM(
        (n, WAITING, rows * qkv.dtype.itemsize // 4, lanes), word(qkv.dtype.itemsize)
    )
    scratch = {"deltas": pltpu.VMEM((padded, LANES), qkv.dtype)}
    scratch |= {
        "d_values": total(problem.padded),
        "d_keys": total(problem.padded),
        "d_queries": total(problem.block_backward),
    }
    if newer:
        scratch["softened"] = words(2, tpu_slopes.KEY_TILE, tpu_slopes.QUERY_TILE)
    if short:
        scratch["turned"] = words(3, heads.rows, padded)
    normed = "norm" in extras
    if normed:
        out_specs.append(pl.BlockSpec((1, 2, 8, c3 // 3), lambda i: (i, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((rows, 2, 8, c3 // 3), jnp.float32))
        scratch["held"] = pltpu.VMEM((2 * heads.tiles, chunk_of_a_row(problem), LANES), jnp.float32)
    if _is_straight(problem) and (normed or "rope" in extras):
        scratch["ready"] = pltpu.VMEM(whole_row(problem, padded, 2 * c3 // 3), qkv.dtype)
    extras = whole_channels(problem, extras, qkv.dtype) | {"spread": tpu_channels.spreading(heads, qkv.dtype)}
    d_qkv, *d_norm = pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        grid=(rows,),
        in_specs=[row(c3), row(c3 // 3), row(c3 // 3), row(LANES), extra_specs(extras, problem)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem()),
        interpret=problem.interpret,
        name="stdit_spatial_backward",
    )(qkv, d_out, out, logs, extras)
    scales = jnp.asarray([[1.0], [problem.scale]], jnp.float32)
    return d_qkv, *(x.sum((0, 2)) * scales for x in d_norm)


def _is_straight(problem) -> bool:
    return problem.padded <= STRAIGHT


def _kernel(qkv_ref, do_ref, out_ref, logs_ref, extras, d_ref, *rest, problem):
    *d_norm_ref, scratch = rest
    row = _Row(problem, extras, qkv_ref, do_ref, out_ref, logs_ref, d_ref, scratch)
    if row.ready is qkv_ref:
        return _attend_back(row)
    each_chunk(problem, functools.partial(_prepare, row))
    _attend_back(row)
    for ref in d_norm_ref:
        ref[...] = jnp.zeros_like(ref)
    each_chunk(problem, functools.partial(_undo, row, d_norm_ref))


def _attend_back(row):
    problem = row.problem
    heads, blocks = range(problem.heads.count), row.blocks
    if _is_straight(problem):
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
        for total in row.key_sums:
            total[head % 2] = jnp.zeros_like(total[0])

        def block(i, carry, head=head):
            row.first = i
            tpu_slopes.pipeline([(head, 0, *tile) for tile in row.tiles], *row.stages)
            return carry

        jax.lax.fori_loop(0, blocks, block, 0)
        row.close(head)


class _Row:
    """One program: what is open of heads and blocks while tiles go by."""

    def __init__(self, problem, extras, qkv_ref, do_ref, out_ref, logs_ref, d_ref, scratch):
        self.problem, self.heads, self.extras = problem, problem.heads, extras
        self.qkv_ref, self.do_ref, self.out_ref, self.logs_ref = qkv_ref, do_ref, out_ref, logs_ref
        self.d_ref, self.scratch, self.deltas = d_ref, scratch, scratch["deltas"]
        self.key_sums, self.query_sum = (scratch["d_values"], scratch["d_keys"]), scratch["d_queries"]
        # Where q and k lie ready. In long rows their gradients take their place; in a straight line each head would then
        # wait for the one before.
        self.ready = scratch.get("ready", d_ref) if "weight" in extras else qkv_ref
        self.scale = problem.scale if self.ready is qkv_ref else 1.0  # that k does not have yet
        self.dtype, self.rows, self.padded = qkv_ref.dtype, problem.block_backward, problem.padded
        self.whole = (
            (0, 0, pl.ds(0, self.padded)) if problem.pieces == 1 else (pl.ds(0, problem.pieces), 0, slice(None))
        )
        self.blocks = -(-problem.size // self.rows)
        queries = tpu_slopes.cuts(self.rows, tpu_slopes.QUERY_TILE)
        keys = tpu_slopes.cuts(self.padded, tpu_slopes.KEY_TILE)
        self.tiles = [(at_query, at_key) for at_query in queries for at_key in keys]
        self.stages = self.start, self.soften, self.finish
        self.keys, self.queries, self.products, self.softened, self.d_q = {}, {}, {}, {}, {}
        self.exponents = []  # of all tiles so far
        self.zero, self.count = unknown_zero(1), itertools.count()
        wait = lambda tile, x: hold(scratch["held"], (tile,), x, self.zero)
        self.wait = wait if "held" in scratch else None
        self.short = "turned" in scratch
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
        products, slot = self.products.pop(tile), next(self.count) % WAITING
        self.exponents.append(products[0])
        found = tpu_slopes.slopes(*products, self.dtype)
        if "softened" in self.scratch:
            rows, lanes = (at_key.stop - at_key.start) * self.dtype.itemsize // 4, at_query.stop - at_query.start
            there = [(which, slot, slice(rows), slice(lanes)) for which in range(2)]
            held = [hold(self.scratch["softened"], at, x, self.zero) for at, x in zip(there, found)]
            self.softened[tile] = lambda: [read() for read in held]
        else:
            self.softened[tile] = lambda: found

    def finish(self, head, i, at_query, at_key):
        slopes = self.softened.pop((head, i, at_query.start, at_key.start))()
        keys, queries = self.keys[head], self.queries[head, i]
        keys = keys._replace(k_t=keys.k_t())
        queries = queries._replace(q_t=queries.q_t(), do_t=queries.do_t())
        dv, dk, dq = tpu_slopes.gradients(keys, queries, at_key, at_query, *slopes)
        straight = isinstance(self.first, int)
        for total, x in zip(self.key_sums, (dv, dk)):
            at = head % len(total), slice(None), at_key
            hold(total, at, x if straight and i == at_query.start == 0 else total[at] + x, self.zero)
        total, at = self.query_sum, ((head * self.blocks + i) % len(total), slice(None), at_query)
        dq = dq if at_key.start == 0 else total[at] + dq
        if self.short or at_key.stop != self.padded:
            dq = hold(total, at, dq, self.zero)()
        if at_key.stop != self.padded:
            return
        self.d_q.setdefault((head, i), []).append(dq)
        if at_query.stop == self.rows:
            dq = jnp.concatenate(self.d_q.pop((head, i)), 1) * (1 / LOG2E)
            self._give(head, 0, self.at(i)[1], self._turned(dq, head))
            if straight and (i + 1) * self.rows >= self.problem.size:
                self.close(head)

    def _late(self, at, share):
        """`at`, in a short row not known before this share of the exponents of the tile half a head ago is: what waits for
        nothing is made heads before its turn, and spills."""
        late = once(self.exponents, max(1, len(self.tiles) // 2), self.zero, share) if self.short else 0
        if isinstance(late, int):
            return at
        axis = 2 if self.problem.pieces == 1 else 0
        start = pl.multiple_of(at[axis].start + late, 16) if axis == 2 else at[axis].start + late
        return *at[:axis], pl.ds(start, at[axis].size), *at[axis + 1 :]

    def _wait(self, which, slot, x):
        """Transposed operands: the function that reads them, which stands in their place until `finish`."""
        if not self.short:
            return lambda: x
        at = which, slot % WAITING, slice(None), slice(x.shape[1])
        return hold(self.scratch["turned"], at, x, self.zero)

    def _read(self, head, which, at):
        """[rows, 128] of q (0), k (1) or v (2), with its neighbours."""
        return self.heads.gather(reader(self.ready if which < 2 else self.qkv_ref, which, self.heads, at), head)

    def open(self, head):
        k, v = (self._read(head, which, self._late(self.whole, share)) for which, share in ((1, EARLY), (2, 1)))
        found = tpu_slopes.key_operands(self.heads, head, k.astype(jnp.float32) * self.scale, v, self._shown)
        self.keys[head] = found._replace(k_t=self._wait(0, head, found.k_t))

    def _queries(self, head, i):
        first, at = self.at(i)
        q = self._read(head, 0, self._late(at, EARLY))
        do = self.heads.gather(reader(self.do_ref, 0, self.heads, self._late(at, 1)), head)
        marks = self.logs_ref[at].reshape(self.rows, LANES), self.deltas[pl.ds(first, self.rows), :]
        exist = functools.partial(self._exist, first)
        found, slot = tpu_slopes.query_operands(self.heads, head, q, do, *marks, exist), head * self.blocks + i
        return found._replace(q_t=self._wait(1, slot, found.q_t), do_t=self._wait(2, slot, found.do_t))

    def close(self, head):
        """Gradients of keys and values."""
        dv, dk = (total[head % len(total)] for total in self.key_sums)
        dv, dk = (self._turned(x, head) for x in (dv, dk * (self.scale / LOG2E)))
        self._give(head, 1, self.whole, dk)
        self._give(head, 2, self.whole, self._shown(dv))

    def _exist(self, first, x):
        """x, queries from the first one on; zero beyond the last one of the row."""
        if isinstance(first, int):
            return first_rows(x, self.problem.size - first)
        if self.problem.size % self.rows == 0:
            return x
        return existing(x, rows_inside(self.rows, self.problem.size, first))

    def _shown(self, x):
        """x, all keys; zero where no query sees them."""
        x = first_rows(x, self.problem.size)
        return existing(x, rows_shown(self.problem, self.extras, None))

    def _turned(self, x, head):
        """[rows, 128] of [channels of a head, rows]."""
        return self.heads.put_rows(x, head).T

    def _give(self, head, which, at, x):
        """Writes the head's lanes of x into its tiles of the gradient of q (0), k (1) or v (2), to the rows `at`. Heads come
        in order: what lies before the head in its first tile is kept; what lies behind it in its last tile is written later,
        and kept where it is a q or k that is still to be read."""
        tile, first, spans = self.heads.place(head)
        x, lane = x.astype(self.dtype), jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        for step in range(1 + spans):
            there = self.d_ref.at[(*at, lanes_of(which * self.heads.tiles + tile + step))]
            own, end = (lane >= first if step == 0 and first else None), first + self.heads.dim - step * LANES
            if self.ready is self.d_ref and which < 2 and end < LANES:
                own = lane < end if own is None else own & (lane < end)
            # By `choose`, as words, it takes longer here (v6e).
            merged = x if own is None else jnp.where(own, x, there[...].reshape(x.shape))
            there[...] = merged.reshape(there.shape)


def _prepare(row, rows, at):
    """Writes q and k of some rows, normalised and rotated, where they are read."""
    problem, heads = row.problem, row.heads
    for which in range(2):
        read, valid = reader(row.qkv_ref, which, heads, at), _valid(problem, rows)
        tiles = prepared(problem, row.extras, which, read, rows, valid, row.dtype, row.wait)
        for tile in range(heads.tiles):
            _put(row.ready, which * heads.tiles + tile, at, tiles(tile))


def _undo(row, d_norm_ref, rows, at):
    """From gradients of what was prepared to gradients of q and k, of some rows. d_norm_ref: in a list, or none."""
    sides, tiles = [_Side(row, which, rows, at) for which in range(2)], range(row.heads.tiles)
    # Tile by tile, not side by side: q and k share the rotation's tables, and both wait less (v6e: 14% less time).
    products = [[side.products(tile) for side in sides] for tile in tiles] if d_norm_ref else []
    undone = [
        side.normalised([x[which] for x in products], *d_norm_ref) if d_norm_ref else side.rotated
        for which, side in enumerate(sides)
    ]
    for tile, which in itertools.product(tiles, range(2)):
        _put(row.d_ref, which * row.heads.tiles + tile, at, undone[which](tile))


class _Side:
    """q (0) or k (1) of some rows, and their gradients, by tiles of lanes."""

    def __init__(self, row, which, rows, at):
        self.row, self.which, self.rows = row, which, rows
        self.x, self.d = (reader(ref, which, row.heads, at) for ref in (row.qkv_ref, row.d_ref))
        self.valid, self.waiting = _valid(row.problem, rows), {}
        turned = "tables" in row.extras
        self.turned_first, self.turned_last = turned and not row.problem.norm_first, turned and row.problem.norm_first

    def raw(self, tile):
        return existing(self.x(tile).astype(jnp.float32), self.valid)

    def gradient(self, tile):
        return existing(self.d(tile).astype(jnp.float32), self.valid)

    def weight(self, tile):
        return self.row.extras["weight"][self.which : self.which + 1, lanes_of(tile)]

    def tables(self, tile):
        return turning(self.row.extras, self.rows, tile)

    def rotated(self, tile):
        """What was rotated and scaled alone."""
        return tpu_channels.turn_back(self.gradient(tile), self.tables(tile)) * self.weight(tile)

    def products(self, tile):
        """w g u. One of the two is held: g where it was rotated back, else u."""
        u, g = self.raw(tile), self.gradient(tile)
        u = tpu_channels.turn(u, self.tables(tile)) if self.turned_first else u
        g = tpu_channels.turn_back(g, self.tables(tile)) if self.turned_last else g
        there = self.which * self.row.heads.tiles + tile
        self.waiting[tile] = held = self.row.wait(there, g if self.turned_last else u)
        u, g = (u, held()) if self.turned_last else (held(), g)
        return (self.weight(tile) * g * u).astype(self.row.dtype)

    def normalised(self, products, d_norm_ref):
        """tile → gradient; adds that of the norm's weight."""
        heads, spread, dtype = self.row.heads, self.row.extras["spread"], self.row.dtype
        root = tpu_channels.root_marks(heads, lambda tile: existing(self.x(tile), self.valid), spread)
        along = root * root * root * tpu_channels.collect(heads, spread, products.__getitem__) * (1.0 / heads.dim)
        root_of, along_of = (tpu_channels.spread_out(heads, spread, marks, dtype) for marks in (root, along))

        def undone(tile):
            held = self.waiting[tile]()
            u, g = (self.raw(tile), held) if self.turned_last else (held, self.gradient(tile))
            g = g * root_of(tile)
            d_norm_ref[0, self.which, :, lanes_of(tile)] += (g * u).reshape(-1, 8, LANES).sum(0)
            d = self.weight(tile) * g - u * along_of(tile)
            return tpu_channels.turn_back(d, self.tables(tile)) if self.turned_first else d

        return undone


def _put(ref, tile, at, x):
    there = ref.at[(*at, lanes_of(tile))]
    there[...] = x.astype(ref.dtype).reshape(there.shape)


def _valid(problem, rows):
    """[rows, 128] bool: those that exist, or None where all do; rows: of each_chunk."""
    if not isinstance(rows.start, int) or rows.start + rows.size <= problem.size:
        return None
    return rows_inside(rows.size, problem.size, rows.start)
