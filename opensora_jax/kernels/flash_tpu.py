"""Flash attention on TPUs for heads of 128, as MMDiT has: any length, keys beyond a sample's length hidden.

Arrays stay [B, L, N*128]: a head is one tile of lanes, picked by the block index. Forward runs over blocks of keys with
a running maximum; backward is one kernel for dk and dv and one for dq over transposed scores [keys, queries], where the
row statistics lie along lanes as they are stored ([B, N, 1, T]).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels.tpu_lanes import COLUMNS_BY_COLUMNS, LANES, LOG2E, ROWS_BY_ROWS, TINY, dot

VMEM_LIMIT = 64 << 20
BLIND = -1e30
BLOCK = {"queries": 1024, "keys": 1024}


class Problem(NamedTuple):
    """The static part of a call."""

    heads: int
    queries: int
    keys: int
    block_q: int
    block_k: int
    scale: float
    interpret: bool


def attend(q, k, v, lengths, *, heads, scale, interpret, blocks=None):
    """[B, T, N*128] over [B, S, N*128]; lengths: [B] int32."""
    fit = lambda most, length: min(most, -(-length // LANES) * LANES)
    sizes = blocks or (BLOCK["queries"], BLOCK["keys"])
    sizes = fit(sizes[0], q.shape[1]), fit(sizes[1], k.shape[1])
    return _attend(q, k, v, lengths, Problem(heads, q.shape[1], k.shape[1], *sizes, scale, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, lengths, problem):
    return _forward(q, k, v, lengths, problem)[0]


def _attend_forward(q, k, v, lengths, problem):
    out, lse = _forward(q, k, v, lengths, problem)
    return out, (q, k, v, lengths, out, lse)


def _attend_backward(problem, residuals, d_out):
    q, k, v, lengths, out, lse = residuals
    split = lambda x: x.reshape(*x.shape[:2], problem.heads, LANES)
    delta = jnp.einsum("btnh,btnh->bnt", split(d_out), split(out), preferred_element_type=jnp.float32)[:, :, None]
    operands = (lengths, q, k, v, d_out, lse, delta)
    total = pltpu.VMEM((problem.block_k, LANES), jnp.float32)
    dk, dv = _call(_keys_kernel, "flash_tpu_dkv", problem, operands, (k, v), "keys", [total, total])
    total = pltpu.VMEM((problem.block_q, LANES), jnp.float32)
    (dq,) = _call(_queries_kernel, "flash_tpu_dq", problem, operands, (q,), "queries", [total])
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, lengths, problem):
    stat = pltpu.VMEM((problem.block_q, LANES), jnp.float32)
    lse = jax.ShapeDtypeStruct((q.shape[0], problem.heads, 1, problem.queries), jnp.float32)
    return _call(_forward_kernel, "flash_tpu", problem, (lengths, q, k, v), (q, lse), "queries", [stat] * 3)


def _call(kernel, name, problem, operands, results, kept, scratch):
    """Grid (sample, head, kept block, moving block): `kept` says whether blocks of queries or of keys stay."""
    counts = {
        "queries": -(-problem.queries // problem.block_q),
        "keys": -(-problem.keys // problem.block_k),
    }
    moving = "keys" if kept == "queries" else "queries"
    at = lambda which: lambda b, n, i, j: (b, i if which == kept else j, n)
    query = pl.BlockSpec((1, problem.block_q, LANES), at("queries"))
    key = pl.BlockSpec((1, problem.block_k, LANES), at("keys"))
    row = pl.BlockSpec((1, 1, 1, problem.block_q), lambda b, n, i, j: (b, n, 0, i if kept == "queries" else j))
    specs = [pl.BlockSpec(memory_space=pltpu.SMEM), query, key, key, query, row, row][: len(operands)]
    of = lambda x: row if x.ndim == 4 else query if kept == "queries" else key
    return pl.pallas_call(
        functools.partial(kernel, problem=problem),
        grid=(operands[1].shape[0], problem.heads, counts[kept], counts[moving]),
        in_specs=specs,
        out_specs=[of(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=problem.interpret,
        name=name,
    )(*operands)


def _rows(ref, first, size):
    """A block [rows, 128] with zeros beyond the end of its array."""
    x = ref[0]
    if size % x.shape[0] == 0:
        return x
    row = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < size, x, jnp.zeros((), x.dtype))


def _forward_kernel(lengths_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, peak_ref, total_ref, sum_ref, *, problem):
    length = jnp.minimum(lengths_ref[pl.program_id(0)], problem.keys)
    step = pl.program_id(3)
    first = step * problem.block_k

    @pl.when(step == 0)
    def _start():
        peak_ref[...] = jnp.full_like(peak_ref, BLIND)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(first < length)
    def _accumulate():
        q = (q_ref[0].astype(jnp.float32) * (problem.scale * LOG2E)).astype(q_ref.dtype)
        scores = dot(q, k_ref[0], ROWS_BY_ROWS)
        column = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(column < length, scores, BLIND)
        peak = jnp.maximum(peak_ref[...], scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - peak[:, :1])
        fade = jnp.exp2(peak_ref[...] - peak)
        total_ref[...] = total_ref[...] * fade + weights.sum(-1, keepdims=True)
        sum_ref[...] = sum_ref[...] * fade + dot(weights.astype(q.dtype), _rows(v_ref, first, problem.keys))
        peak_ref[...] = peak

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        total = total_ref[...]
        o_ref[0] = (sum_ref[...] * (1.0 / jnp.maximum(total, TINY))).astype(o_ref.dtype)
        lse = jnp.where(total > 0, peak_ref[...] + jnp.log2(jnp.maximum(total, TINY)), -BLIND)
        lse_ref[0, 0] = lse.T[:1]


def _weights_and_slope(refs, first_q, first_k, length, problem):
    """[keys, queries], and the operands with their overhang zeroed."""
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref = refs
    q, do = (_rows(ref, first_q, problem.queries) for ref in (q_ref, do_ref))
    k, v = (_rows(ref, first_k, problem.keys) for ref in (k_ref, v_ref))
    weights = jnp.exp2(dot(k, q, ROWS_BY_ROWS) * (problem.scale * LOG2E) - lse_ref[0, 0])
    key = first_k + jax.lax.broadcasted_iota(jnp.int32, weights.shape, 0)
    query = first_q + jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    seen = (key < length) & (query < problem.queries)
    slope = weights * (dot(v, do, ROWS_BY_ROWS) - delta_ref[0, 0])
    weights, slope = (jnp.where(seen, x, 0.0).astype(q.dtype) for x in (weights, slope))
    return weights, slope, q, k, do


def _keys_kernel(lengths_ref, *refs, problem):
    inputs, (dk_ref, dv_ref, dk_sum, dv_sum) = refs[:6], refs[6:]
    length = jnp.minimum(lengths_ref[pl.program_id(0)], problem.keys)
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _start():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    first_q, first_k = step * problem.block_q, pl.program_id(2) * problem.block_k
    weights, slope, q, _, do = _weights_and_slope(inputs, first_q, first_k, length, problem)
    dv_sum[...] += dot(weights, do)
    dk_sum[...] += dot(slope, q)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        dk_ref[0] = (dk_sum[...] * problem.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _queries_kernel(lengths_ref, *refs, problem):
    inputs, (dq_ref, dq_sum) = refs[:6], refs[6:]
    length = jnp.minimum(lengths_ref[pl.program_id(0)], problem.keys)
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _start():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    first_q, first_k = pl.program_id(2) * problem.block_q, step * problem.block_k
    _, slope, _, k, _ = _weights_and_slope(inputs, first_q, first_k, length, problem)
    dq_sum[...] += dot(slope, k, COLUMNS_BY_COLUMNS)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        dq_ref[0] = (dq_sum[...] * problem.scale).astype(dq_ref.dtype)
