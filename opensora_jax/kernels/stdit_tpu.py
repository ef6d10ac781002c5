"""Fused STDiT attention on TPUs (Pallas, Mosaic), spatial mode: rows of S tokens, forward and backward.

The kernels read the projected activations [rows, S, 3C] where they lie and write [rows, S, C]: no transpose, pad or
copy around them (tpu_lanes.py says how heads are split), also where a row lies in pieces. Forward: grid (row, block of
queries); keys and values of a row are prepared once into fast memory, then each block of queries sees all keys in a
single-pass softmax. Backward: grid (row); per head and block of queries the transposed scores are recomputed, so that
the sums over keys run along sublanes and only dq needs a transposed operand. S needs no alignment: rows beyond it are
hidden keys.
Temporal mode is in stdit_tpu_temporal.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, spec, stdit_tpu_temporal, tpu_channels
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.tpu_lanes import (
    COLUMNS_BY_COLUMNS,
    HIDE,
    LANES,
    LOG2E,
    ROWS_BY_ROWS,
    TINY,
    Heads,
    Preparation,
    aligned,
    at_lane,
    dot,
    norm_rows,
    norm_weight,
    rotation_tables,
)

LEAST_QUERIES = 128  # at once; fewer push the keys again and again
# Up to here a division a head, which sends its sum across the lanes, takes longer than all heads' products of a block: they
# are divided together (v6e, 2026-11-29: 77 us instead of 111 over 120 keys; 4% slower over 1024).
FEW_KEYS = 256


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

    @property
    def piece(self) -> int:
        """Tokens of one piece."""
        return self.size // self.pieces

    @property
    def padded(self) -> int:
        return -(-self.size // LANES) * LANES

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
    """At once, forward and backward: as the table says, halved until they fit. A row that is served forward must be served
    backward, so both are asked for."""
    found = []
    for stage, needed in (("forward", _forward_bytes), ("backward", _backward_bytes)):
        (most,) = blocks.find("stdit_spatial", stage, call.head_dim, call.keys)
        while needed(call, most) > blocks.vmem() and most > LEAST_QUERIES:
            most = max(LEAST_QUERIES, most // 2 // LANES * LANES)
        if needed(call, most) > blocks.vmem():
            raise Unsupported(
                f"rows of {call.keys} tokens need {needed(call, most) >> 20} MiB of VMEM {stage}, "
                f"{blocks.vmem() >> 20} are to be had"
            )
        found.append(most)
    return found[0], found[1]


# What the compiler asks for, within 3% of its own count for rows of 4096 (v5p's messages, 2026-11-29).
def _forward_bytes(call: Call, most: int) -> int:
    padded, channels, itemsize = _sizes(call)
    kept = 2 * call.heads * LANES * itemsize  # prepared k and v
    scores = 3 * 4 + itemsize  # of one head, those of the next in the making, and the weights of the one before
    return padded * (4 * channels * itemsize + kept + _extra_bytes(call)) + most * (
        8 * channels * itemsize + scores * padded
    )


def _backward_bytes(call: Call, most: int) -> int:
    padded, channels, itemsize = _sizes(call)
    of_head = LANES * (4 * 4 + 2 * itemsize)  # k, its raw form, v; sums of two gradients
    scores = 4 * 4 + 2 * itemsize  # with weights, their gradients and slopes
    return padded * (7 * channels * itemsize + of_head + _extra_bytes(call) + most * scores)


def _sizes(call: Call) -> tuple[int, int, int]:
    """Rows in whole tiles, channels, bytes of an element."""
    return -(-call.keys // LANES) * LANES, call.heads * call.head_dim, 2 if call.dtype == "bfloat16" else 4


def _extra_bytes(call: Call) -> int:
    """A token's share of tables and key mask, all in float32 and double-buffered."""
    return 8 * LANES * (2 * ("rope" in call.extras) + ("kv_mask" in call.extras))


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
    interpret=None,
):
    b, t, s, c3 = qkv_btsc.shape
    heads = Heads(num_heads, c3 // 3 // num_heads)
    interpret = spec.platform() != "tpu" if interpret is None else interpret
    norm = None if q_scale is None else norm_rows(heads, q_scale, k_scale)
    if mode == "temporal":
        return stdit_tpu_temporal.attend(qkv_btsc, heads, norm, rope, norm_before_rope, kv_mask, pieces, interpret)
    extras = {} if norm is None else {"norm": norm}
    size = pieces * s
    fitting = functools.partial(whole_pieces, s, pieces) if pieces > 1 else functools.partial(even_blocks, s)
    optional = {"norm": q_scale, "rope": rope, "kv_mask": kv_mask}
    names = frozenset(name for name, value in optional.items() if value is not None)
    call = Call("spatial", b * t // pieces, size, size, num_heads, heads.dim, str(qkv_btsc.dtype), names)
    queries = [fitting(most) for most in most_queries(call)]
    problem = Problem(heads, size, *queries, norm_before_rope, t, interpret, pieces)
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
    return piece % 16 == 0 and call.keys % LANES == 0 and piece <= min(most_queries(call))


def whole_pieces(piece: int, pieces: int, most: int) -> int:
    """The most tokens up to `most` that are some of the pieces, the same in every block."""
    return max(count * piece for count in range(1, pieces + 1) if pieces % count == 0 and count * piece <= most)


def even_blocks(size: int, most: int) -> int:
    """The smallest multiple of 16 that covers `size` in as few blocks as `most` would."""
    count = -(-size // most)
    return -(-size // (count * 16)) * 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv, extras, problem):
    return forward_call("stdit_spatial", qkv, qkv, qkv, (0, 1, 2), extras, problem)


def _attend_forward(qkv, extras, problem):
    return forward_call("stdit_spatial", qkv, qkv, qkv, (0, 1, 2), extras, problem), (qkv, extras)


def _attend_backward(problem, residuals, d_out):
    qkv, extras = residuals
    d_qkv, *d_norm = _backward(qkv, extras, d_out, problem)
    d_extras = jax.tree.map(jnp.zeros_like, extras)
    if d_norm:
        d_extras["norm"] = d_norm[0].sum((0, 2))
    return d_qkv, d_extras


_attend.defvjp(_attend_forward, _attend_backward)


def extra_specs(extras, problem):
    """Norm weights and tables stay put; the key mask moves with the row, over and over again where rows are more."""
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
    specs = {name: whole(x) for name, x in extras.items()}
    if "hidden" in extras:
        specs["hidden"] = pl.BlockSpec(
            (1, problem.padded, LANES),
            lambda row, *_: (jax.lax.rem(jax.lax.div(row, problem.outer), extras["hidden"].shape[0]), 0, 0),
        )
    return specs


def _prepare(problem, extras, head, which, first, rows, dtype):
    """The preparation of q or k for `rows` rows from `first`."""
    tables = (None, None)
    if "rope" in extras:
        tables = tuple(aligned(extras["rope"][i, pl.ds(first, rows), :], problem.heads, head) for i in range(2))
    weight = norm_weight(problem.heads, head, which, extras.get("norm"))
    return Preparation(weight, *tables, problem.norm_first, problem.heads.dim, dtype, matrix_sums=False)


def reader(ref, which, heads: Heads, at=(...,)):
    """tile → [rows, 128] of q (0), k (1) or v (2) in a block [.., rows, n*C]; at: which of its rows."""
    start = which * heads.tiles
    return lambda tile: ref[(*at, slice((start + tile) * LANES, (start + tile + 1) * LANES))].reshape(-1, LANES)


def rows_inside(rows: int, size, first=0):
    """[rows, 128] bool: rows that exist."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) < size


def own_float(read, heads, head, rows, valid):
    """A head in float32, zero in foreign lanes and in rows that do not exist."""
    keep = heads.own(head, rows) if valid is None else heads.own(head, rows) & valid
    return jnp.where(keep, heads.gather(read, head).astype(jnp.float32), 0.0)


def hide_keys(k, head, problem, extras, valid):
    """Prepared keys with the logit of hidden keys in the spare lane."""
    lane = problem.heads.spare(head)
    if "hidden" in extras:
        k = at_lane(k, lane, extras["hidden"][0])
    return k if valid is None else at_lane(k, lane, jnp.where(valid, k, HIDE))


def rows_shown(problem, extras, valid):
    """[padded, 128] bool or None: keys that exist and are not hidden."""
    if "hidden" not in extras:
        return valid
    shown = extras["hidden"][0] > HIDE / 2
    return shown if valid is None else shown & valid


def _forward_kernel(q_ref, k_ref, v_ref, extras, o_ref, keys, values, *, problem):
    heads = problem.heads
    dtype = q_ref.dtype

    @pl.when(pl.program_id(1) == 0)
    def _prepare_row():
        padded = problem.padded
        valid = rows_inside(padded, problem.size) if padded != problem.size else None
        visible = rows_shown(problem, extras, valid)
        for head in range(heads.count):
            own = heads.own(head, padded)
            k = own_float(reader(k_ref, 0, heads), heads, head, padded, valid)
            k = _prepare(problem, extras, head, 1, 0, padded, dtype).forward(k) * problem.scale
            keys[head] = hide_keys(k, head, problem, extras, valid).astype(dtype)
            v = jnp.where(own, heads.gather(reader(v_ref, 0, heads), head), jnp.ones((), dtype))
            values[head] = v if visible is None else jnp.where(visible, v, jnp.zeros((), dtype))

    tiles = [None] * heads.tiles
    scores, weights = {}, {}
    totals = jnp.ones((problem.block, LANES), jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, totals.shape, 1)
    # One head's products run beside the softmax of the head before and the output of the one before that.
    for starting in range(heads.count + 2):
        between, ending = starting - 1, starting - 2
        if starting < heads.count:
            scores[starting] = dot(_queries(q_ref, problem, extras, starting), keys[starting], ROWS_BY_ROWS)
        if between in scores:
            x = scores.pop(between)
            weights[between] = jnp.exp2(x - x.max(-1, keepdims=True)).astype(dtype)
        if ending in weights:
            out = dot(weights.pop(ending), values[ending])
            if "spread" in extras:
                totals = jnp.where((lane & ~1) == tpu_channels.marks(heads)[ending], out, totals)
            else:
                total = out[:, heads.spare(ending) : heads.spare(ending) + 1]
                out = out * (1.0 / jnp.maximum(total, TINY))
            heads.scatter(tiles, ending, out)
    if "spread" in extras:
        tiles = _divided(tiles, totals, extras["spread"], dtype)
    for tile, x in enumerate(tiles):
        o_ref[..., tile * LANES : (tile + 1) * LANES] = x.astype(dtype).reshape(*o_ref.shape[:-1], LANES)


def _divided(tiles, totals, spread, dtype):
    """By the sums of the weights, all heads at once."""
    inverse = tpu_channels.split(1.0 / jnp.maximum(totals, TINY), dtype)
    scale = [dot(inverse, spread[:, start * LANES : (start + 2) * LANES]) for start in range(0, len(tiles), 2)]
    part = lambda tile: slice(tile % 2 * LANES, (tile % 2 + 1) * LANES)
    return [x * scale[tile // 2][:, part(tile)] for tile, x in enumerate(tiles)]


def _queries(q_ref, problem, extras, head):
    """Prepared queries of a head, with a one where hidden keys have their logit; the scale is in the keys."""
    heads, rows, dtype = problem.heads, problem.block, q_ref.dtype
    read, spare = reader(q_ref, 0, heads), heads.spare(head)
    if "norm" not in extras and "rope" not in extras:
        one = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) == spare, 1.0, 0.0).astype(dtype)
        return jnp.where(heads.own(head, rows), heads.gather(read, head), one)
    q = own_float(read, heads, head, rows, None)
    q = _prepare(problem, extras, head, 0, pl.program_id(1) * rows, rows, dtype).forward(q)
    return at_lane(q, spare, 1.0).astype(dtype)


def forward_call(name, q, k, v, lanes, extras, problem):
    """Queries [pieces, rows, T, ..] over keys and values [pieces, rows, S, ..], each at its block of C lanes (`lanes`).
    Rows of keys may be fewer: they serve over and over again."""
    rows, queries = q.shape[1], problem.pieces * q.shape[2]
    channels, padded, block = problem.heads.channels, problem.padded, problem.block
    if problem.pieces == 1:
        queries_at = lambda which: pl.BlockSpec((1, 1, block, channels), lambda row, i: (0, row, i, which))
    else:
        some = (block // problem.piece, 1, problem.piece, channels)
        queries_at = lambda which: pl.BlockSpec(some, lambda row, i: (i, row, 0, which))
    whole = lambda which: pl.BlockSpec(
        whole_row(problem, padded, channels), lambda row, _: (0, jax.lax.rem(row, k.shape[1]), 0, which)
    )
    prepared = pltpu.VMEM((problem.heads.count, padded, LANES), q.dtype)
    if padded <= FEW_KEYS:
        extras = extras | {"spread": tpu_channels.spreading(problem.heads, q.dtype)}
    return pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem),
        grid=(rows, -(-queries // block)),
        in_specs=[queries_at(lanes[0]), whole(lanes[1]), whole(lanes[2]), extra_specs(extras, problem)],
        out_specs=queries_at(0),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], channels), q.dtype),
        scratch_shapes=[prepared, prepared],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name=name,
    )(q, k, v, extras)


def whole_row(problem, rows: int, channels: int) -> tuple[int, ...]:
    """A block of all pieces of a row; `rows`: with what lies beyond the last token of a row in one piece."""
    return (problem.pieces, 1, problem.piece if problem.pieces > 1 else rows, channels)


def transposed_slopes(k, q, v, do):
    """Softmax weights and gradients of the logits, [keys, queries]; columns that see no key are zero."""
    scores = dot(k, q, ROWS_BY_ROWS)
    peak = scores.max(0, keepdims=True)
    weights = jnp.exp2(scores - peak)
    weights = weights * jnp.where(peak > HIDE / 2, 1.0 / weights.sum(0, keepdims=True), 0.0)
    d_weights = dot(v, do, ROWS_BY_ROWS)
    slope = weights * (d_weights - (weights * d_weights).sum(0, keepdims=True))
    return weights.astype(q.dtype), slope.astype(q.dtype)


def _backward_kernel(qkv_ref, do_ref, extras, d_ref, *rest, problem):
    d_norm_ref, (dk_sum, dv_sum) = (rest[0], rest[1:]) if "norm" in extras else (None, rest)
    heads, padded, rows = problem.heads, problem.padded, problem.block_backward
    dtype = qkv_ref.dtype
    norm = extras.get("norm")
    valid = rows_inside(padded, problem.size) if padded != problem.size else None
    ragged = padded != problem.size or problem.size % rows
    inverse = 1 / LOG2E
    row = (0, 0, slice(0, padded)) if problem.pieces == 1 else (slice(None), 0, slice(None))
    for head in range(heads.count):
        k_raw = own_float(reader(qkv_ref, 1, heads, row), heads, head, padded, valid)
        k_preparation = _prepare(problem, extras, head, 1, 0, padded, dtype)
        k = hide_keys(k_preparation.forward(k_raw), head, problem, extras, valid).astype(dtype)
        v = own_float(reader(qkv_ref, 2, heads, row), heads, head, padded, rows_shown(problem, extras, valid)).astype(
            dtype
        )
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

        def block(i, d_weight, head=head, k=k, v=v):
            first = pl.multiple_of(i * rows, 16)
            at = (0, 0, pl.ds(first, rows))
            if problem.pieces > 1:
                count = rows // problem.piece
                at = (pl.ds(i * count, count), 0, slice(None))
            exists = rows_inside(rows, problem.size, first) if ragged else None
            q_raw = own_float(reader(qkv_ref, 0, heads, at), heads, head, rows, exists)
            q_preparation = _prepare(problem, extras, head, 0, first, rows, dtype)
            q = at_lane(q_preparation.forward(q_raw) * problem.scale, heads.spare(head), 1.0).astype(dtype)
            do = own_float(reader(do_ref, 0, heads, at), heads, head, rows, exists).astype(dtype)
            weights, slope = transposed_slopes(k, q, v, do)
            dv_sum[...] += dot(weights, do)
            dk_sum[...] += dot(slope, q)
            dq = dot(slope, k, COLUMNS_BY_COLUMNS) * (problem.scale * inverse)
            own = heads.own(head, rows)
            dq, d_weight_here = q_preparation.backward(q_raw, jnp.where(own, dq, 0.0))
            _merge(d_ref, heads, head, 0, at, dq.astype(dtype))
            return d_weight if d_weight is None else d_weight + _fold(d_weight_here)

        start = None if norm is None else jnp.zeros((8, LANES), jnp.float32)
        d_weight_q = _loop(-(-problem.size // rows), block, start)
        own = heads.own(head, padded)
        dk = jnp.where(own, dk_sum[...], 0.0) * inverse
        dk, d_weight_k = k_preparation.backward(k_raw, dk)
        _merge(d_ref, heads, head, 1, row, dk.astype(dtype))
        _merge(d_ref, heads, head, 2, row, dv_sum[...].astype(dtype))
        if norm is not None:
            _merge(d_norm_ref, heads, head, 0, (0, 0, slice(None)), d_weight_q)
            _merge(d_norm_ref, heads, head, 0, (0, 1, slice(None)), _fold(d_weight_k))


def _loop(count, body, start):
    """fori_loop that keeps a None carry and unrolls short loops."""
    if count <= 2:
        for i in range(count):
            start = body(i, start)
        return start
    if start is None:
        return jax.lax.fori_loop(0, count, lambda i, _: (body(i, None), 0)[1], 0)
    return jax.lax.fori_loop(0, count, body, start)


def _fold(x):
    """Sum of the rows as [8, 128], so that no sublanes are crossed."""
    return x.reshape(x.shape[0] // 8, 8, LANES).sum(0)


def _merge(ref, heads, head, which, at, x):
    """Writes the head's lanes of x into its tiles of q (0), k (1) or v (2), to the rows `at`. Heads come in order: what lies
    beyond the head in its last tile is written later, what lies before it in its first tile is kept."""
    tile, first, spans = heads.place(head)
    for step in range(1 + spans):
        lanes = slice((which * heads.tiles + tile + step) * LANES, (which * heads.tiles + tile + step + 1) * LANES)
        there = ref[(*at, lanes)]
        keep = step == 0 and first > 0
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        merged = jnp.where(lane >= first, x, there.reshape(x.shape)) if keep else x
        ref[(*at, lanes)] = merged.reshape(there.shape)


def _backward(qkv, extras, d_out, problem):
    rows, c3 = qkv.shape[1], qkv.shape[3]
    padded = max(problem.padded, -(-problem.size // problem.block_backward) * problem.block_backward)
    single = _single(padded * c3, qkv.dtype)
    row = lambda width: pl.BlockSpec(whole_row(problem, padded, width), lambda i: (0, i, 0, 0), **single)
    out_specs, out_shape = [row(c3)], [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    if "norm" in extras:
        out_specs.append(pl.BlockSpec((1, 2, 8, c3 // 3), lambda i: (i, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((rows, 2, 8, c3 // 3), jnp.float32))
    total = pltpu.VMEM((problem.padded, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, problem=problem),
        grid=(rows,),
        in_specs=[row(c3), row(c3 // 3), extra_specs(extras, problem)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[total, total],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem()),
        interpret=problem.interpret,
        name="stdit_spatial_backward",
    )(qkv, d_out, extras)


def _single(elements, dtype):
    """Long rows are not double-buffered: they would not fit."""
    return {"pipeline_mode": pl.Buffered(1)} if elements * jnp.dtype(dtype).itemsize > blocks.vmem() // 8 else {}
