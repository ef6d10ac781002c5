"""Our Pallas kernels for NVIDIA GPUs, through the Triton lowering (sm80 and later): flash attention of any shape.

A head of 72 is read as 64 + 16 columns instead of 128, so 11 % instead of 78 % of the tensor-core work is padding.
Forward keeps the log-sum-exp of each row; backward is two kernels (dk and dv by key block, dq by query block) that
recompute the weights. Nothing is added atomically: results are the same in every run. Fused STDiT rows: stdit_gpu.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from opensora_jax.kernels import blocks as block_table
from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.xla import HIDDEN

LOG2E = math.log2(math.e)


class Blocks(NamedTuple):
    """Rows of queries and of keys in one tile, and Triton's launch parameters."""

    q: int
    k: int
    warps: int
    stages: int


class Options(NamedTuple):
    """The static part of a call."""

    scale: float
    causal: bool
    blocks: tuple[tuple[str, Blocks], ...]  # instead of the table's, by pass
    interpret: bool

    def block(self, stage: str, q, k) -> Blocks:
        chosen = dict(self.blocks).get(stage)
        chosen = chosen or Blocks(*block_table.find("pallas_gpu", stage, q.shape[-1], k.shape[1]))
        fit = lambda size, length: max(16, min(size, pl.next_power_of_2(length)))
        return chosen._replace(q=fit(chosen.q, q.shape[1]), k=fit(chosen.k, k.shape[1]))


def supports(call: Call) -> None:
    if call.dtype not in ("bfloat16", "float16", "float32"):
        raise Unsupported(f"dtype {call.dtype}")
    if call.head_dim > 256:
        raise Unsupported(f"head_dim {call.head_dim} > 256")
    call.refuse("bias")


def interpreted() -> bool:
    """Off the GPU the kernels run in Pallas' interpreter, for tests."""
    return spec.platform() != "cuda"


def attention(
    q_btnh,
    k_bsnh,
    v_bsnh,
    *,
    kv_lengths=None,
    kv_mask=None,
    segment_ids=None,
    bias=None,
    causal=False,
    scale=None,
    blocks=(),
):
    """`blocks` instead of the table's, by pass: (("forward", Blocks(...)), ...)."""
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    batch, queries = q_btnh.shape[:2]
    keys = k_bsnh.shape[1]
    q_ids, kv_ids = segment_ids if segment_ids is not None else (None, None)
    if kv_mask is not None:  # hidden keys get an id of their own
        q_ids = jnp.zeros((batch, queries), jnp.int32) if q_ids is None else q_ids
        kv_ids = jnp.zeros((batch, keys), jnp.int32) if kv_ids is None else kv_ids
        kv_ids = jnp.where(kv_mask, kv_ids, jnp.iinfo(jnp.int32).min)
    masks = {"lengths": kv_lengths, "q_ids": q_ids, "kv_ids": kv_ids}
    masks = {name: x.astype(jnp.int32) for name, x in masks.items() if x is not None}
    return _flash(q_btnh, k_bsnh, v_bsnh, masks, Options(float(scale), causal, tuple(blocks), interpreted()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, masks, options):
    return _forward(q, k, v, masks, options)[0]


def _flash_forward(q, k, v, masks, options):
    out, lse = _forward(q, k, v, masks, options)
    return out, (q, k, v, masks, out, lse)


def _flash_backward(options, residuals, d_out):
    q, k, v, masks, out, lse = residuals
    delta = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32)
    dk, dv = _backward_keys(q, k, v, masks, d_out, lse, delta, options)
    dq = _backward_queries(q, k, v, masks, d_out, lse, delta, options)
    return dq, dk, dv, jax.tree.map(lambda x: None, masks)


_flash.defvjp(_flash_forward, _flash_backward)


# Tiles: a head is one or two pieces of power-of-two width, loads are masked where a tile overhangs its array.


def pieces(head_dim: int) -> list[tuple[int, int]]:
    """(first column, width): 72 → (0, 64), (64, 16); 128 → (0, 128); 8 → (0, 16)."""
    first = 1 << (head_dim.bit_length() - 1)
    if first < 16:
        return [(0, 16)]
    rest = head_dim - first
    return [(0, first)] + ([(first, max(16, pl.next_power_of_2(rest)))] if rest else [])


def load_tile(ref, batch, head, row, rows):
    """The pieces [rows, width] of a head of [B, L, N, H], zero outside the array."""
    return [
        plgpu.load(ref.at[batch, at_row, head, at_column], mask=mask, other=None if mask is None else 0)
        for at_row, at_column, mask in _places(ref, row, rows)
    ]


def store_tile(ref, batch, head, row, tile):
    for (at_row, at_column, mask), x in zip(_places(ref, row, tile[0].shape[0]), tile):
        plgpu.store(ref.at[batch, at_row, head, at_column], x.astype(ref.dtype), mask=mask)


def _places(ref, row, rows):
    """Row and column numbers of each piece, with a mask where a tile can overhang the array."""
    _, length, _, head_dim = ref.shape
    for start, width in pieces(head_dim):
        at_row = jnp.broadcast_to((row + jnp.arange(rows))[:, None], (rows, width))
        at_column = jnp.broadcast_to((start + jnp.arange(width))[None, :], (rows, width))
        mask = at_row < length if length % rows else None
        if start + width > head_dim:
            mask = at_column < head_dim if mask is None else mask & (at_column < head_dim)
        yield at_row, at_column, mask


def load_row(ref, *index_row_rows, other=0):
    """[rows] of the last axis of a [.., L] array."""
    *index, row, rows = index_row_rows
    at = row + jnp.arange(rows)
    mask = at < ref.shape[-1] if ref.shape[-1] % rows else None
    return plgpu.load(ref.at[(*index, at)], mask=mask, other=None if mask is None else other)


def dot(a, b):
    """a [m, k] @ b [k, n] in float32; float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def dots(a_pieces, b_pieces):
    """[m, n] = sum over pieces of a b^T."""
    return sum(dot(a, b.T) for a, b in zip(a_pieces, b_pieces))


def _visible(masks, batch, q_row, k_row, size, keys, causal, length):
    """[q, k] bool, or None."""
    bq, bk = size
    mask = None
    if length is not None or keys % bk:
        limit = keys if length is None else length
        mask = jnp.broadcast_to((k_row + jnp.arange(bk) < limit)[None, :], (bq, bk))
    conditions = []
    if causal:
        conditions.append((q_row + jnp.arange(bq))[:, None] >= (k_row + jnp.arange(bk))[None, :])
    if "q_ids" in masks:
        q_ids = load_row(masks["q_ids"], batch, q_row, bq)
        kv_ids = load_row(masks["kv_ids"], batch, k_row, bk)
        conditions.append(q_ids[:, None] == kv_ids[None, :])
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def _length(masks, batch, keys):
    return jnp.minimum(masks["lengths"][batch], keys) if "lengths" in masks else None


def _forward_kernel(q_ref, k_ref, v_ref, masks, o_ref, lse_ref, *, block, options):
    block_index, head, batch = (pl.program_id(i) for i in range(3))
    keys = k_ref.shape[1]
    q_row = block_index * block.q
    q = load_tile(q_ref, batch, head, q_row, block.q)
    length = _length(masks, batch, keys)

    def body(i, carry):
        peak, total, acc = carry
        k_row = i * block.k
        scores = dots(q, load_tile(k_ref, batch, head, k_row, block.k)) * (options.scale * LOG2E)
        mask = _visible(masks, batch, q_row, k_row, (block.q, block.k), keys, options.causal, length)
        if mask is not None:
            scores = jnp.where(mask, scores, HIDDEN)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp2(scores - new_peak[:, None])
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        fade = jnp.exp2(peak - new_peak)
        v = load_tile(v_ref, batch, head, k_row, block.k)
        acc = [a * fade[:, None] + dot(weights.astype(x.dtype), x) for a, x in zip(acc, v)]
        return new_peak, total * fade + weights.sum(-1), acc

    limit = keys if length is None else length
    if options.causal:
        limit = jnp.minimum(limit, q_row + block.q)
    start = (
        jnp.full(block.q, HIDDEN, jnp.float32),
        jnp.zeros(block.q, jnp.float32),
        [jnp.zeros((block.q, width), jnp.float32) for _, width in pieces(q_ref.shape[-1])],
    )
    peak, total, acc = jax.lax.fori_loop(0, _ceil_div(limit, block.k), body, start)
    safe = jnp.where(total > 0, total, 1.0)
    store_tile(o_ref, batch, head, q_row, [a / safe[:, None] for a in acc])
    lse = jnp.where(total > 0, peak + jnp.log2(safe), -HIDDEN)  # +1e30 makes weights of blind rows vanish
    at = q_row + jnp.arange(block.q)
    mask = at < lse_ref.shape[-1] if lse_ref.shape[-1] % block.q else None
    plgpu.store(lse_ref.at[batch, head, at], lse, mask=mask)


def _ceil_div(a, b):
    return -(-a // b) if isinstance(a, int) else jax.lax.div(a + (b - 1), b)


def _keys_kernel(q_ref, k_ref, v_ref, masks, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, block, options):
    block_index, head, batch = (pl.program_id(i) for i in range(3))
    queries, keys = q_ref.shape[1], k_ref.shape[1]
    k_row = block_index * block.k
    k = load_tile(k_ref, batch, head, k_row, block.k)
    v = load_tile(v_ref, batch, head, k_row, block.k)
    length = _length(masks, batch, keys)

    def body(i, carry):
        dk, dv = carry
        q_row = i * block.q
        q = load_tile(q_ref, batch, head, q_row, block.q)
        do = load_tile(do_ref, batch, head, q_row, block.q)
        weights, ds = _weights_and_slope(q, k, v, do, masks, (lse_ref, delta_ref), (batch, head, q_row, k_row), block,
                                         (keys, length), options)  # fmt: skip
        dv = [a + dot(weights.astype(x.dtype).T, x) for a, x in zip(dv, do)]
        dk = [a + dot(ds.astype(x.dtype).T, x) for a, x in zip(dk, q)]
        return dk, dv

    zeros = lambda: [jnp.zeros((block.k, width), jnp.float32) for _, width in pieces(k_ref.shape[-1])]
    first = jax.lax.div(k_row, block.q) if options.causal else 0
    dk, dv = jax.lax.fori_loop(first, _ceil_div(queries, block.q), body, (zeros(), zeros()))
    store_tile(dk_ref, batch, head, k_row, [a * options.scale for a in dk])
    store_tile(dv_ref, batch, head, k_row, dv)


def _queries_kernel(q_ref, k_ref, v_ref, masks, do_ref, lse_ref, delta_ref, dq_ref, *, block, options):
    block_index, head, batch = (pl.program_id(i) for i in range(3))
    keys = k_ref.shape[1]
    q_row = block_index * block.q
    q = load_tile(q_ref, batch, head, q_row, block.q)
    do = load_tile(do_ref, batch, head, q_row, block.q)
    length = _length(masks, batch, keys)

    def body(i, dq):
        k_row = i * block.k
        k = load_tile(k_ref, batch, head, k_row, block.k)
        v = load_tile(v_ref, batch, head, k_row, block.k)
        _, ds = _weights_and_slope(q, k, v, do, masks, (lse_ref, delta_ref), (batch, head, q_row, k_row), block,
                                   (keys, length), options)  # fmt: skip
        return [a + dot(ds.astype(x.dtype), x) for a, x in zip(dq, k)]

    limit = keys if length is None else length
    if options.causal:
        limit = jnp.minimum(limit, q_row + block.q)
    start = [jnp.zeros((block.q, width), jnp.float32) for _, width in pieces(q_ref.shape[-1])]
    dq = jax.lax.fori_loop(0, _ceil_div(limit, block.k), body, start)
    store_tile(dq_ref, batch, head, q_row, [a * options.scale for a in dq])


def _weights_and_slope(q, k, v, do, masks, row_refs, place, block, extent, options):
    """Softmax weights and the gradient of the scores (before the scale) of one tile."""
    batch, head, q_row, k_row = place
    keys, length = extent
    lse = load_row(row_refs[0], batch, head, q_row, block.q, other=-HIDDEN)  # rows beyond the end weigh nothing
    delta = load_row(row_refs[1], batch, head, q_row, block.q)
    weights = jnp.exp2(dots(q, k) * (options.scale * LOG2E) - lse[:, None])
    mask = _visible(masks, batch, q_row, k_row, (block.q, block.k), keys, options.causal, length)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights, weights * (dots(do, v) - delta[:, None])


def _call(kernel, name, grid, block, out_shape, options, *operands):
    """Whole arrays stay in device memory; the kernels address them by program id."""
    return pl.pallas_call(
        functools.partial(kernel, block=block, options=options),
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=options.interpret,
        name=name,
    )(*operands)


def _forward(q, k, v, masks, options):
    batch, queries, heads, _ = q.shape
    block = options.block("forward", q, k)
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ]
    grid = (_ceil_div(queries, block.q), heads, batch)
    return _call(_forward_kernel, "flash_forward", grid, block, out_shape, options, q, k, v, masks)


def _backward_keys(q, k, v, masks, d_out, lse, delta, options):
    block = options.block("dkv", q, k)
    grid = (_ceil_div(k.shape[1], block.k), k.shape[2], k.shape[0])
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    return _call(_keys_kernel, "flash_dkv", grid, block, out_shape, options, q, k, v, masks, d_out, lse, delta)


def _backward_queries(q, k, v, masks, d_out, lse, delta, options):
    block = options.block("dq", q, k)
    grid = (_ceil_div(q.shape[1], block.q), q.shape[2], q.shape[0])
    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return _call(_queries_kernel, "flash_dq", grid, block, out_shape, options, q, k, v, masks, d_out, lse, delta)
