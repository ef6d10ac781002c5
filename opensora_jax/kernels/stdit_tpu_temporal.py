"""Fused STDiT attention on TPUs (Pallas, Mosaic), temporal mode: T tokens at each of S positions, T up to 128.

One program takes [T, G neighbouring positions, 3C] as it lies in memory; tpu_temporal.py says how it lies in fast memory:
a tile of scores is [128, 128] however long T is (more only where two positions of T do not fit). Scores are [keys, queries];
softmax is a single pass, and its sums are divided out once for all heads. The backward pass is in
stdit_tpu_temporal_backward.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import blocks, stdit_tpu_temporal_backward, tpu_channels, tpu_temporal
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.tpu_lanes import COLUMNS_BY_COLUMNS, LANES, ROWS_BY_ROWS, Heads, dot
from opensora_jax.kernels.tpu_temporal import PERIOD, Block, Problem

MAX_ROW = 128
TOGETHER = 4  # heads; static schedules of v5e and v6e, 2026-11-29


def supports(call: Call) -> None:
    heads = Heads(call.heads, call.head_dim)
    if call.queries > MAX_ROW:
        raise Unsupported(f"{call.queries} frames are more than {MAX_ROW}")
    if heads.dim > LANES - PERIOD:
        raise Unsupported(f"head_dim {heads.dim} leaves fewer than {PERIOD} lanes of {LANES}")
    tpu_channels.marks(heads)
    problem = _problem(heads, call.queries, 1, jnp.dtype(call.dtype).itemsize)
    needed = stdit_tpu_temporal_backward.bytes_of(problem, "norm" in call.extras, "rope" in call.extras, buffers=1)
    if needed > blocks.vmem():
        raise Unsupported(
            f"{call.queries} frames need {needed >> 20} MiB of VMEM backward, {blocks.vmem() >> 20} are to be had"
        )


def _problem(heads, frames, positions, itemsize, norm_first=True, pieces=1, interpret=False):
    block = 8 if frames > 64 and itemsize == 4 else 16
    return Problem(heads, frames, positions, block, itemsize, norm_first, pieces, interpret)


def attend(qkv_btsc, heads, norm, rope, norm_first, kv_mask, pieces, interpret):
    b, t, s, c3 = qkv_btsc.shape
    problem = _problem(heads, pieces * t, s, qkv_btsc.dtype.itemsize, norm_first, pieces, interpret)
    shown = None if kv_mask is None else kv_mask.astype(jnp.float32)
    out = _attend(qkv_btsc.reshape(pieces, -1, *qkv_btsc.shape[1:]), norm, rope, shown, problem)
    out = out if kv_mask is None else jnp.where(kv_mask.any(-1)[:, None, None, None], out, 0)
    return out.reshape(*qkv_btsc.shape[:3], c3 // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(qkv, norm, rope, shown, problem):
    return _call(qkv, norm, rope, shown, problem)


def _attend_forward(qkv, norm, rope, shown, problem):
    return _call(qkv, norm, rope, shown, problem), (qkv, norm, rope, shown)


def _attend_backward(problem, residuals, d_out):
    qkv, norm, rope, shown = residuals
    d_qkv, d_norm = stdit_tpu_temporal_backward.gradients(qkv, norm, rope, shown, d_out, problem)
    return d_qkv, d_norm, jax.tree.map(jnp.zeros_like, rope), jax.tree.map(jnp.zeros_like, shown)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(qkv, norm, rope, shown, problem):
    extras = tpu_temporal.operands(problem, qkv.dtype, norm, rope, shown)
    run = functools.partial(kernel, problem=problem)
    normed = norm is not None
    return pl.pallas_call(
        lambda qkv_ref, refs, *rest: run(qkv_ref, refs | {"norm": normed}, *rest),
        grid=(qkv.shape[1], -(-problem.positions // problem.block)),
        in_specs=[problem.of_program(3), tpu_temporal.specs_of(extras)],
        out_specs=problem.of_program(1),
        out_shape=jax.ShapeDtypeStruct((*qkv.shape[:4], problem.heads.channels), qkv.dtype),
        scratch_shapes=[
            *problem.scratch(3),
            problem.held(2 * TOGETHER, 1, problem.rows, problem.rows, dtype=jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.vmem()
        ),
        interpret=problem.interpret,
        name="stdit_temporal",
    )(qkv, extras)


def kernel(qkv_ref, extras, o_ref, words, waiting, scores, *, problem):
    heads, dtype = problem.heads, o_ref.dtype
    block = Block(problem, extras, words, waiting, dtype)
    block.prepare([qkv_ref])
    # Where registers are few, weights are made again rather than kept until their sum is known: up to 2% slower with norms
    # (v6e, 2026-11-30; v5e 6%), and rows of 16 wait for memory anyway.
    again = not block.halves and (extras["norm"] or problem.frames <= 16)

    def body(first):
        q_code, k_code = extras["q_code"][...], extras["k_code"][0]
        outs = [[None] * heads.count for _ in range(problem.beside)]
        started, weights = {}, {}
        # Some heads' products run beside the softmax of those before and the output of the ones before those.
        for starting, between, ending in problem.stages(TOGETHER):
            for slot, head in starting:
                q = block.operand(first + slot, 0, head, q_code)
                k = block.operand(first + slot, 1, head, k_code)
                x = dot(k, q, ROWS_BY_ROWS)
                held = block.hold(scores, slot * heads.count + head, x)
                started[slot, head] = x.max(0, keepdims=True), held
            for slot, head in between:
                peak, held = started.pop((slot, head))
                x = jnp.exp2(held()[0] - peak)
                total = x.sum(0, keepdims=True)
                x = jnp.exp2(held()[0] - (peak + jnp.log2(total))) if again else x * (1.0 / total)
                weights[slot, head] = x.astype(dtype)
            for slot, head in ending:
                v = block.operand(first + slot, 2, head)
                outs[slot][head] = dot(weights.pop((slot, head)), v, COLUMNS_BY_COLUMNS)
        for slot, out in enumerate(outs):
            block.save(0, first + slot, out)  # in the place of q

    block.each_tile(body)
    block.each_chunk(functools.partial(block.give, o_ref, range(heads.tiles)))
