"""Cross-attention on TPUs: many queries over a short text whose keys and values stay in fast memory.

Forward is the spatial kernel of stdit_tpu.py with keys of their own; the backward pass is in cross_tpu_backward.py.
"""

import functools

import jax
import jax.numpy as jnp

from opensora_jax.kernels import blocks, cross_tpu_backward
from opensora_jax.kernels.stdit_tpu import Problem, even_blocks, forward_call
from opensora_jax.kernels.tpu_lanes import HIDE, LANES, Heads
from opensora_jax.kernels.xla import key_visibility

MAX_KEYS = 1024


def attend(q, k, v, kv_lengths, kv_mask, heads: Heads, scale, interpret):
    """[n * B, T, C] over [B, S, C]: sample i of the queries sees the keys of sample i modulo B."""
    queries = lambda stage: even_blocks(q.shape[1], *blocks.find("cross_attention", stage, heads.dim, k.shape[1]))
    # The kernels scale by 1/sqrt(H); any other scale is put into q.
    usual = heads.dim**-0.5
    q = q if scale == usual else q * jnp.asarray(scale / usual, q.dtype)
    problem = Problem(heads, k.shape[1], queries("forward"), queries("backward"), True, 1, interpret)
    extras = {}
    shown = key_visibility(k.shape[1], kv_lengths, kv_mask)
    if shown is not None:
        hidden = jnp.where(shown, 0.0, HIDE).astype(jnp.float32)
        extras["hidden"] = jnp.broadcast_to(hidden[:, :, None], (*hidden.shape, LANES))
    return _attend(q, k, v, extras, problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, extras, problem):
    return forward_call("cross_attention", q[None], k[None], v[None], (0, 0, 0), extras, problem)[0]


def _attend_forward(q, k, v, extras, problem):
    return _attend(q, k, v, extras, problem), (q, k, v, extras)


def _attend_backward(problem, residuals, d_out):
    q, k, v, extras = residuals
    return *cross_tpu_backward.gradients(q, k, v, extras, d_out, problem), jax.tree.map(jnp.zeros_like, extras)


_attend.defvjp(_attend_forward, _attend_backward)
