"""Fused STDiT attention on TPUs (Pallas, Mosaic), spatial mode: rows of S tokens, forward and backward.

The kernels read the projected activations [rows, S, 3C] where they lie and write [rows, S, C]: no transpose, pad or
copy around them (tpu_lanes.py says how heads are split), also where a row lies in pieces. Forward: grid (row, block of
queries); keys and values of a row are prepared once into fast memory, then each block of queries sees all keys in a
single-pass softmax. Scores are [keys, queries] and outputs [channels, queries], so that sums and divisions run along
sublanes and the tiles of weights, not a head's few channels, fill the matrix unit. A loop over heads makes the scores of
some beside the softmax of those before: scores go to memory as they come and are read once, by the next round, from
where its own are written a moment later. Where keys are so few that it would take one turn, heads are a straight line.
S needs no alignment: rows beyond it are hidden keys. The backward pass is in
stdit_tpu_backward.py.
Temporal mode is in stdit_tpu_temporal.py.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, spec, stdit_tpu_backward, stdit_tpu_temporal, tpu_channels, tpu_slopes
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.tpu_lanes import (
    HIDE,
    LANES,
    LOG2E,
    REGISTER,
    ROWS_BY_ROWS,
    TINY,
    Heads,
    choose,
    dot,
    hold,
    lanes_of,
    norm_rows,
    rotation_tables,
    unknown_zero,
)
from opensora_jax.kernels.tpu_rows import (
    CHUNK,
    existing,
    extra_specs,
    hide_keys,
    hides_keys,
    prepared,
    reader,
    row_chunks,
    row_sizes,
    rows_shown,
    rows_valid,
    whole_channels,
    whole_row,
    with_zeros,
)

PASSES = ("forward", "backward")
LEAST_QUERIES = 128  # at once; fewer push the keys again and again
# v6e, v5e, 2026-11-29: the shortest schedules, and few registers spilled, of tiles of 128, 256, 512 and 1,024.
KEY_TILE, QUERY_TILE = 512, 256
SPILLS = 3 << 20  # bytes
SCORES = 2 << 20  # in the making, of some heads, where one head does not have more
WAITING = 7  # tiles of scores in a straight line; three take an eighth more time (v6e, 300 keys, 2026-12-01)


class Problem(NamedTuple):
    """The static part of a call."""

    heads: Heads
    size: int  # tokens of a row
    block: int  # queries at once, forward
    block_backward: int
    norm_first: bool
    outer: int  # rows that share a line of the key mask
    interpret: bool
    pieces: int = 1  # of a row, one behind the other; each of whole registers
    name: str | None = None  # of what the backward pass may find kept

    @property
    def piece(self) -> int:
        """Tokens of one piece."""
        return self.size // self.pieces

    @property
    def padded(self) -> int:
        return -(-self.size // LANES) * LANES

    @property
    def used(self) -> int:
        """Keys up to the last one, in whole registers."""
        return -(-self.size // REGISTER) * REGISTER

    @property
    def group(self) -> int:
        """Heads whose scores are in the making at once."""
        return _group(self.heads.count, self.padded * self.block)

    @property
    def straight(self) -> bool:
        """Would a loop take one turn?"""
        return self.heads.count == 2 * self.group

    @property
    def scale(self) -> float:
        return self.heads.dim**-0.5 * LOG2E


def supports(call: Call) -> None:
    if call.dtype not in ("bfloat16", "float32"):
        raise Unsupported(f"dtype {call.dtype}")
    Heads(call.heads, call.head_dim).check()
    if call.kind == "temporal":
        return stdit_tpu_temporal.supports(call)
    tpu_channels.marks(Heads(call.heads, call.head_dim))
    most_queries(call)


def most_queries(call: Call) -> tuple[int, int]:
    """At once, forward and backward: as the table says, forward halved until they fit. A row that is served forward must be
    served backward, so both are asked for."""
    forward, backward = (blocks.find("stdit_spatial", stage, call.head_dim, call.keys)[0] for stage in PASSES)
    while _forward_bytes(call, forward) > blocks.vmem() and forward > LEAST_QUERIES:
        forward = max(LEAST_QUERIES, forward // 2 // LANES * LANES)
    for stage, needed in zip(PASSES, (_forward_bytes(call, forward), stdit_tpu_backward.least_bytes(call))):
        if needed > blocks.vmem():
            raise Unsupported(
                f"rows of {call.keys} tokens need {needed >> 20} MiB of VMEM {stage}, {blocks.vmem() >> 20} are to be had"
            )
    return forward, backward


def _forward_bytes(call: Call, most: int) -> int:
    """Not less than the compiler asks for: 80.5 MiB for rows of 4,096 on v6e, 59.3 for 2,304 with norm and rotation on v5p,
    512 queries at once (2026-11-29)."""
    padded, channels, itemsize, extra = row_sizes(call)
    heads = Heads(call.heads, call.head_dim)
    kept = heads.count * (LANES + heads.rows + 8) * itemsize  # prepared k and v
    queries = (4 * channels + 2 * LANES + heads.count * LANES) * itemsize + 4 * heads.count * (heads.rows + 8)
    scores = 4 * max(SCORES, padded * most)  # fewer queries may let more heads in
    waiting = 4 * channels * max(CHUNK, most) * ("norm" in call.extras)
    return padded * (4 * channels * itemsize + kept + extra) + most * queries + scores + waiting + SPILLS


def _group(heads: int, scores: int) -> int:
    """The most heads with `scores` each, of which there are several such groups."""
    return max(n for n in range(1, heads // 2 + 1) if heads % n == 0 and (n == 1 or n * scores <= SCORES))


def stdit_attention(
    qkv_btsc,
    *,
    num_heads,
    mode,
    q_scale,
    k_scale,
    rope,
    norm_before_rope,
    kv_mask=None,
    pieces=1,
    name=None,
    interpret=None,
):
    b, t, s, c3 = qkv_btsc.shape
    heads = Heads(num_heads, c3 // 3 // num_heads)
    interpret = spec.platform() != "tpu" if interpret is None else interpret
    norm = None if q_scale is None else norm_rows(heads, q_scale, k_scale)
    if mode == "temporal":
        out = stdit_tpu_temporal.attend(qkv_btsc, heads, norm, rope, norm_before_rope, kv_mask, pieces, interpret)
        return spec.named(out, name)
    extras = {} if norm is None else {"norm": norm}
    size = pieces * s
    fitting = functools.partial(whole_pieces, s, pieces) if pieces > 1 else functools.partial(even_blocks, s)
    optional = {"norm": q_scale, "rope": rope, "kv_mask": kv_mask}
    present = frozenset(name for name, value in optional.items() if value is not None)
    call = Call("spatial", b * t // pieces, size, size, num_heads, heads.dim, str(qkv_btsc.dtype), present)
    queries = [fitting(most) for most in most_queries(call)]
    problem = Problem(heads, size, *queries, norm_before_rope, t, interpret, pieces, name)
    if rope is not None:
        extras["rope"] = rotation_tables(rope, max(problem.padded, *(-(-s // size) * size for size in queries)))
    if kv_mask is not None:
        hidden = jnp.where(kv_mask, 0.0, HIDE)[:, :, None].astype(jnp.float32)
        extras["hidden"] = jnp.broadcast_to(hidden, (*kv_mask.shape, LANES))
    return _attend(qkv_btsc.reshape(pieces, -1, s, c3), extras, problem).reshape(b, t, s, c3 // 3)


def takes_pieces(call: Call, pieces: int) -> bool:
    """Can the kernels read rows in pieces where they lie?"""
    piece = call.keys // pieces
    if call.kind == "temporal":
        return True
    return piece % 16 == 0 and call.keys % LANES == 0 and piece <= most_queries(call)[0]


def whole_pieces(piece: int, pieces: int, most: int) -> int:
    """The most tokens up to `most`, but one piece at least, that are some of the pieces, the same in every block."""
    return max(
        count * piece for count in range(1, pieces + 1) if pieces % count == 0 and count * piece <= max(most, piece)
    )


def even_blocks(size: int, most: int) -> int:
    """What covers `size` in as few blocks as `most` would: whole tiles of lanes, which scores have along queries, or a multiple
    of 16 in shorter rows."""
    count, step = -(-size // most), LANES if size > LANES else 16
    return -(-size // (count * step)) * step


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv, extras, problem):
    return _forward(qkv, extras, problem)[0]


def _forward(qkv, extras, problem):
    """Logarithms come along whether anybody reads them or not: one kernel to compile, at a thirtieth of its traffic."""
    return forward_call("stdit_spatial", qkv, qkv, qkv, (0, 1, 2), extras, problem, logs=True)


def _attend_forward(qkv, extras, problem):
    out, logs = (spec.kept(x, problem.name) for x in _forward(qkv, extras, problem))
    return out, (qkv, extras, out, logs)


def _attend_backward(problem, residuals, d_out):
    qkv, extras, out, logs = residuals
    d_qkv, *d_norm = stdit_tpu_backward.gradients(qkv, extras, d_out, out, logs, problem)
    d_extras = jax.tree.map(jnp.zeros_like, extras)
    if d_norm:
        d_extras["norm"] = d_norm[0]
    return d_qkv, d_extras


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_kernel(q_ref, k_ref, v_ref, extras, o_ref, *rest, problem):
    *logs_ref, keys, values, queries, scores, turned, logs, held = rest
    heads, dtype, zero = problem.heads, q_ref.dtype, unknown_zero(2)
    wait = (lambda tile, x: hold(held[0], (tile, slice(len(x))), x, zero)) if held else None

    @pl.when(pl.program_id(1) == 0)
    def _prepare_row():
        for rows, at in row_chunks(problem, problem.padded):
            _prepare_keys(problem, k_ref, extras, rows, at, keys, wait)
            _prepare_values(problem, v_ref, extras, rows, at, values)

    for rows, at in row_chunks(problem, problem.block):
        _prepare_queries(problem, q_ref, extras, rows, at, queries, wait)

    attend = _attend_straight if problem.straight else _attend_in_turns
    attend(problem, keys, values, queries, scores, turned, logs)
    for tile, (rows, at) in itertools.product(range(heads.tiles), row_chunks(problem, problem.block)):
        there = o_ref.at[(*at, lanes_of(tile))]
        there[...] = heads.turned_tile(turned, tile, rows).astype(dtype).T.reshape(there.shape)
    if logs_ref:
        for head, mark in enumerate(tpu_channels.marks(heads)):
            turned[mark : mark + 2] = jnp.broadcast_to(logs[head], (2, problem.block))
        logs_ref[0][...] = tpu_channels.split(turned[:LANES].T, dtype).reshape(logs_ref[0].shape)


def _attend_straight(problem, keys, values, queries, scores, turned, logs):
    """Few keys: a tile's products are long under way. So others start meanwhile, whose scores wait in memory."""
    heads, zero, made = problem.heads, unknown_zero(2), {}

    def start(n, head, at):
        x = dot(keys[head, : problem.used], queries[head, at], ROWS_BY_ROWS)
        there = 0, slice(problem.used), slice(x.shape[1])
        made[n] = hold(scores[n % len(scores)], there, x, zero), x.max(0, keepdims=True)

    def soften(n, head, at):
        read, peak = made[n]
        weights = jnp.exp2(read() - peak).astype(keys.dtype)
        made[n] = dot(values[head], with_zeros(weights, problem.padded)), peak

    def give(n, head, at):
        x, logs[head, :, at] = _divided(heads, *made.pop(n))
        hold(turned, (slice(head * heads.rows, (head + 1) * heads.rows), at), x, zero)

    tiles = itertools.product(range(heads.count), tpu_slopes.cuts(problem.block, QUERY_TILE))
    waiting = [lambda *_: None] * (WAITING - 1)
    tpu_slopes.pipeline([(n, *tile) for n, tile in enumerate(tiles)], start, *waiting, soften, give)


def _attend_in_turns(problem, keys, values, queries, scores, turned, logs):
    heads, group = problem.heads, problem.group
    key_tiles, query_tiles = tpu_slopes.cuts(problem.padded, KEY_TILE), tpu_slopes.cuts(problem.block, QUERY_TILE)

    def turn(peaks, finished, started):
        """Finishes a group of heads, by their peaks, and starts another; either may be missing. Gives its peaks."""
        found = []
        for i, at_query in itertools.product(range(group), query_tiles):
            out, peak, old = 0.0, None, None if finished is None else peaks[len(found)]
            for tile in key_tiles:
                at_key = slice(tile.start, min(tile.stop, problem.used))
                if finished is not None:
                    weights = jnp.exp2(scores[i][0, at_key, at_query] - old).astype(keys.dtype)
                    weights = with_zeros(weights, tile.stop - tile.start)
                    out = out + dot(values[finished + i, :, tile], weights)
                if started is not None:
                    x = dot(keys[started + i, at_key], queries[started + i, at_query], ROWS_BY_ROWS)
                    scores[i][0, at_key, at_query] = x
                    highest = x.max(0, keepdims=True)
                    peak = highest if peak is None else jnp.maximum(peak, highest)
            found.append(peak)
            if finished is not None:
                first = pl.multiple_of((finished + i) * heads.rows, 8)
                x, logs[finished + i, :, at_query] = _divided(heads, out, old)
                turned[pl.ds(first, heads.rows), at_query] = x
        return found

    last = heads.count - group
    peaks = turn(None, None, 0)
    peaks = jax.lax.fori_loop(0, last // group, lambda n, peaks: turn(peaks, n * group, (n + 1) * group), peaks)
    turn(peaks, last, None)


def _divided(heads: Heads, out, peak):
    """Rows of a head by the sum of weights that came with them; minus the logarithm of the sum."""
    total = jnp.maximum(out[heads.rows : heads.rows + 1], TINY)
    return out[: heads.rows] * (1.0 / total), -(peak + jnp.log2(total))


def _prepare_keys(problem, k_ref, extras, rows, at, keys, wait):
    """[heads, padded, 128], with the logit of hidden keys in the spare lane. Other heads' lanes meet zeros in q."""
    heads = problem.heads
    read, valid = reader(k_ref, 0, heads, at), rows_valid(problem, rows)
    tiles = prepared(problem, extras, 1, read, rows, valid, keys.dtype, wait)
    for head in range(heads.count):
        keys[head, rows] = hide_keys(heads.gather(tiles, head), head, problem, extras, valid, rows)


def _prepare_values(problem, v_ref, extras, rows, at, values):
    """[heads, rows of a head and 8 of ones, padded]: products with the ones are sums of weights; zero where hidden."""
    heads, dtype = problem.heads, values.dtype
    read, shown = reader(v_ref, 0, heads, at), rows_shown(problem, extras, rows_valid(problem, rows), rows)
    turn = functools.cache(lambda tile: existing(read(tile), shown).T.astype(jnp.float32))
    ones = existing(jnp.ones((rows.stop - rows.start, LANES), jnp.float32), shown).T[:8]
    for head in range(heads.count):
        values[head, :, rows] = jnp.concatenate([heads.rows_of(turn, head), ones], 0).astype(dtype)


def _prepare_queries(problem, q_ref, extras, rows, at, queries, wait):
    """[heads, queries, 128] with a one where hidden keys have their logit."""
    heads, dtype, size = problem.heads, queries.dtype, rows.stop - rows.start
    first = pl.multiple_of(pl.program_id(1) * problem.block + rows.start, 16)
    tiles = prepared(problem, extras, 0, reader(q_ref, 0, heads, at), pl.ds(first, size), None, dtype, wait)
    ones = jnp.full((size, LANES), 1.0 if hides_keys(problem, extras) else 0.0, dtype)
    for head in range(heads.count):
        other = choose(lambda lane, head=head: lane == heads.spare(head), ones, jnp.zeros_like(ones))
        queries[head, rows] = choose(functools.partial(heads.within, head), heads.gather(tiles, head), other)


def forward_call(name, q, k, v, lanes, extras, problem, logs=False):
    """Queries [pieces, rows, T, ..] over keys and values [pieces, rows, S, ..], each at its block of C lanes (`lanes`).
    Rows of keys may be fewer: they serve over and over again. logs: (result, what the backward pass needs of sums)."""
    rows, queries = q.shape[1], problem.pieces * q.shape[2]
    channels, padded, block = problem.heads.channels, problem.padded, problem.block
    if problem.pieces == 1:
        queries_at = lambda which, width=channels: pl.BlockSpec((1, 1, block, width), lambda row, i: (0, row, i, which))
    else:
        some = (block // problem.piece, 1, problem.piece)
        queries_at = lambda which, width=channels: pl.BlockSpec((*some, width), lambda row, i: (i, row, 0, which))
    whole = lambda which: pl.BlockSpec(
        whole_row(problem, padded, channels), lambda row, _: (0, jax.lax.rem(row, k.shape[1]), 0, which)
    )
    heads = problem.heads
    extras = whole_channels(problem, extras, q.dtype)
    at_once = max(rows.stop - rows.start for rows, _ in row_chunks(problem, padded))
    scratch = [
        pltpu.VMEM((heads.count, padded, LANES), q.dtype),
        pltpu.VMEM((heads.count, heads.rows + 8, padded), q.dtype),
        pltpu.VMEM((heads.count, block, LANES), q.dtype),
        [pltpu.VMEM((1, padded, min(block, QUERY_TILE)), jnp.float32)] * (WAITING + 1)
        if problem.straight
        else [pltpu.VMEM((1, padded, block), jnp.float32)] * problem.group,
        pltpu.VMEM((heads.count * heads.rows, block), jnp.float32),
        pltpu.VMEM((heads.count, 1, block), jnp.float32),
        [pltpu.VMEM((heads.tiles, at_once, LANES), jnp.float32)] * ("spread" in extras),
    ]
    widths = [channels, LANES] if logs else [channels]
    found = pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem),
        grid=(rows, -(-queries // block)),
        in_specs=[queries_at(lanes[0]), whole(lanes[1]), whole(lanes[2]), extra_specs(extras, problem)],
        out_specs=[queries_at(0, width) for width in widths],
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:3], width), q.dtype) for width in widths],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name=name,
    )(q, k, v, extras)
    return found if logs else found[0]
