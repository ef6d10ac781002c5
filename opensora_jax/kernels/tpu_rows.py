"""What the spatial and cross-attention kernels for TPUs share: heads out of rows of tokens, which tokens count, and q and k
normalised and rotated."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from opensora_jax.kernels import tpu_channels
from opensora_jax.kernels.spec import Call
from opensora_jax.kernels.tpu_lanes import HIDE, LANES, Heads, at_lane, lanes_of

CHUNK = 256  # rows


def extra_specs(extras, problem):
    """Norm weights and tables stay put; the key mask moves with the row, over and over again where rows are more."""
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))
    specs = {name: whole(x) for name, x in extras.items()}
    if "hidden" in extras:
        specs["hidden"] = pl.BlockSpec(
            (1, problem.padded, LANES),
            lambda row, *_: (jax.lax.rem(jax.lax.div(row, problem.outer), extras["hidden"].shape[0]), 0, 0),
        )
    return specs


def row_sizes(call: Call) -> tuple[int, int, int, int]:
    """Rows in whole tiles, channels, bytes of an element, and `extra_bytes`."""
    channels, itemsize = call.heads * call.head_dim, 2 if call.dtype == "bfloat16" else 4
    extra = extra_bytes(channels, itemsize, "rope" in call.extras, "kv_mask" in call.extras)
    return -(-call.keys // LANES) * LANES, channels, itemsize, extra


def extra_bytes(channels: int, itemsize: int, rope: bool, mask: bool) -> int:
    """A token's share of tables, which stay, and of the key mask, in float32, which moves."""
    return 2 * channels * itemsize * rope + 8 * LANES * mask


def whole_row(problem, rows: int, channels: int) -> tuple[int, ...]:
    """A block of all pieces of a row; `rows`: with what lies beyond the last token of a row in one piece."""
    return (problem.pieces, 1, problem.piece if problem.pieces > 1 else rows, channels)


def whole_channels(problem, extras, dtype):
    """Weights of the norms, k's with the scale, and the rotation's tables, along the channels."""
    heads, found = problem.heads, {name: x for name, x in extras.items() if name == "hidden"}
    if "norm" in extras or "rope" in extras:
        weight = extras["norm"] if "norm" in extras else jnp.ones((2, heads.channels), jnp.float32)
        found["weight"] = weight * jnp.asarray([[1.0], [problem.scale]], jnp.float32)
    if "norm" in extras:
        found["spread"] = tpu_channels.spreading(heads, dtype)
    if "rope" in extras:
        found["tables"] = tpu_channels.rotation(heads, extras["rope"], dtype)
    return found


def prepared(problem, extras, which, read, rows, valid, dtype, wait):
    """tile → [rows, 128] of q (0) or k (1), normalised, rotated and scaled, as they lie. Only k is scaled. wait: holds a tile of
    what was rotated while norms are summed and gives the function that reads it; None where nothing is normalised."""
    heads, waiting = problem.heads, {}
    last = lambda x: existing(x.astype(dtype), valid)
    if "weight" not in extras:
        return (
            read if which == 0 else functools.cache(lambda tile: last(read(tile).astype(jnp.float32) * problem.scale))
        )

    def turned(tile):
        x, weight = read(tile).astype(jnp.float32), extras["weight"][which : which + 1, lanes_of(tile)]
        x = x * weight if problem.norm_first else x
        if "tables" in extras:
            # Read back, else it waits in registers while its neighbours are fetched (v6e, 2026-12-01).
            x = tpu_channels.turn(wait(tile, x)() if wait else x, turning(extras, rows, tile))
        return x if problem.norm_first else x * weight

    if not wait:
        return functools.cache(lambda tile: last(turned(tile)))

    def passing(tile):
        if "tables" in extras:
            waiting[tile] = wait(tile, turned(tile))
        return read(tile)

    marks = tpu_channels.root_marks(heads, passing, extras["spread"])
    root = tpu_channels.spread_out(heads, extras["spread"], marks, dtype)
    return functools.cache(lambda tile: last((waiting[tile]() if tile in waiting else turned(tile)) * root(tile)))


def turning(extras, rows, tile: int):
    """The rotation's tables (cos, sin) [rows, 128] of a tile of lanes."""
    return [extras["tables"][i, rows, lanes_of(tile)].astype(jnp.float32) for i in range(2)]


def existing(x, valid):
    """Zero elsewhere; valid: rows, or None for all."""
    return x if valid is None else jnp.where(valid, x, jnp.zeros((), x.dtype))


def reader(ref, which, heads: Heads, at=(...,)):
    """tile → [rows, 128] of q (0), k (1) or v (2) in a block [.., rows, n*C]; at: which of its rows."""
    start = which * heads.tiles
    return lambda tile: ref[(*at, lanes_of(start + tile))].reshape(-1, LANES)


def row_chunks(problem, rows: int):
    """The rows of a block, some at a time so that they fit the registers: where they are, and where they lie in it."""
    if problem.pieces == 1:
        found = (slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))
        return [(at, (0, 0, at)) for at in found]
    piece, count = problem.piece, max(1, CHUNK // problem.piece)
    pieces = (slice(start, min(start + count, rows // piece)) for start in range(0, rows // piece, count))
    return [(slice(at.start * piece, at.stop * piece), (at, 0, slice(None))) for at in pieces]


def chunk_of_a_row(problem) -> int:
    """Rows that are normalised and rotated at once: some whole pieces, or an even part of one."""
    if problem.pieces == 1 or problem.piece > CHUNK:
        return math.gcd(problem.padded if problem.pieces == 1 else problem.piece, CHUNK)
    return problem.piece * max(n for n in range(1, CHUNK // problem.piece + 1) if problem.pieces % n == 0)


def each_chunk(problem, body):
    """body(pl.ds of its rows, where they lie) in a loop over the chunks of a row; those with rows that do not exist come after
    it, and begin at numbers."""
    size = chunk_of_a_row(problem)
    whole = problem.size // size

    def at(i, rows):
        if problem.pieces == 1:
            return 0, 0, rows
        if size >= problem.piece:
            whole = size // problem.piece
            return pl.ds(i * whole, whole), 0, slice(None)
        parts = problem.piece // size
        return jax.lax.div(i, parts), 0, pl.ds(pl.multiple_of(jax.lax.rem(i, parts) * size, 16), size)

    def run(i, carry):
        rows = pl.ds(pl.multiple_of(i * size, 16), size)
        body(rows, at(i, rows))
        return carry

    jax.lax.fori_loop(0, whole, run, 0)
    for i in range(whole, problem.padded // size):
        rows = pl.ds(i * size, size)
        body(rows, at(i, rows))


def rows_valid(problem, rows: slice):
    """[n, 128] bool: tokens that exist, or None where all do."""
    if rows.stop <= problem.size:
        return None
    return rows_inside(rows.stop - rows.start, problem.size, rows.start)


def rows_inside(rows: int, size, first=0):
    """[rows, 128] bool: rows that exist."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) < size


def first_rows(x, count: int):
    """Zero from there on; only the registers that a mask changes go through one."""
    whole = max(0, count // 16 * 16)
    if count >= x.shape[0]:
        return x
    tail = x[whole:]
    tail = jnp.where(jax.lax.broadcasted_iota(jnp.int32, tail.shape, 0) < count - whole, tail, jnp.zeros((), x.dtype))
    return jnp.concatenate([x[:whole], tail], 0) if whole else tail


def with_zeros(x, rows: int):
    """x [n, ..] with zeros below, so many rows in all."""
    missing = rows - len(x)
    return jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)], 0) if missing else x


def own_float(read, heads, head, rows, valid):
    """A head in float32, zero in foreign lanes and in rows that do not exist."""
    keep = heads.own(head, rows) if valid is None else heads.own(head, rows) & valid
    return jnp.where(keep, heads.gather(read, head).astype(jnp.float32), 0.0)


def hides_keys(problem, extras) -> bool:
    """Are there keys that no query sees?"""
    return "hidden" in extras or problem.padded != problem.size


def hide_keys(k, head, problem, extras, valid, rows=slice(None)):
    """Keys with the logit of hidden ones in the spare lane, where another head's channel may lie: in all rows if in any, for
    every query has a one there."""
    if not hides_keys(problem, extras):
        return k
    logit = extras["hidden"][0, rows] if "hidden" in extras else jnp.zeros((), jnp.float32)
    logit = logit if valid is None else jnp.where(valid, logit, HIDE)
    return at_lane(k, problem.heads.spare(head), logit.astype(k.dtype))


def rows_shown(problem, extras, valid, rows=slice(None)):
    """[n, 128] bool or None: keys that exist and are not hidden."""
    if "hidden" not in extras:
        return valid
    shown = extras["hidden"][0, rows] > HIDE / 2
    return shown if valid is None else shown & valid
