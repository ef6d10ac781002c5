"""What the spatial and cross-attention kernels for TPUs share: heads out of rows of tokens, and which tokens count."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from opensora_jax.kernels.spec import Call
from opensora_jax.kernels.tpu_lanes import HIDE, LANES, Heads, Preparation, aligned, at_lane, norm_weight

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
    extra = extra_bytes("rope" in call.extras, "kv_mask" in call.extras)
    return -(-call.keys // LANES) * LANES, call.heads * call.head_dim, 2 if call.dtype == "bfloat16" else 4, extra


def extra_bytes(rope: bool, mask: bool) -> int:
    """A token's share of tables and key mask, all in float32 and double-buffered."""
    return 8 * LANES * (2 * rope + mask)


def whole_row(problem, rows: int, channels: int) -> tuple[int, ...]:
    """A block of all pieces of a row; `rows`: with what lies beyond the last token of a row in one piece."""
    return (problem.pieces, 1, problem.piece if problem.pieces > 1 else rows, channels)


def preparation(problem, extras, head, which, first, rows, dtype):
    """The preparation of q or k for `rows` rows from `first`."""
    tables = (None, None)
    if "rope" in extras:
        tables = tuple(aligned(extras["rope"][i, pl.ds(first, rows), :], problem.heads, head) for i in range(2))
    weight = norm_weight(problem.heads, head, which, extras.get("norm"))
    return Preparation(weight, *tables, problem.norm_first, problem.heads.dim, dtype)


def reader(ref, which, heads: Heads, at=(...,)):
    """tile → [rows, 128] of q (0), k (1) or v (2) in a block [.., rows, n*C]; at: which of its rows."""
    start = which * heads.tiles
    return lambda tile: ref[(*at, slice((start + tile) * LANES, (start + tile + 1) * LANES))].reshape(-1, LANES)


def row_chunks(problem, rows: int):
    """The rows of a block, some at a time so that they fit the registers: where they are, and where they lie in it."""
    if problem.pieces == 1:
        found = (slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))
        return [(at, (0, 0, at)) for at in found]
    piece, count = problem.piece, max(1, CHUNK // problem.piece)
    pieces = (slice(start, min(start + count, rows // piece)) for start in range(0, rows // piece, count))
    return [(slice(at.start * piece, at.stop * piece), (at, 0, slice(None))) for at in pieces]


def rows_valid(problem, rows: slice):
    """[n, 128] bool: tokens that exist, or None where all do."""
    if rows.stop <= problem.size:
        return None
    return rows_inside(rows.stop - rows.start, problem.size, rows.start)


def rows_inside(rows: int, size, first=0):
    """[rows, 128] bool: rows that exist."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) < size


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
