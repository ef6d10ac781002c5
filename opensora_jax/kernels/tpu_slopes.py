"""Gradients of attention over heads of 72 on a TPU, in tiles of [256 keys, 256 queries].

The forward pass leaves the logarithm of each query's sum of weights, so nothing is searched or summed again: minus that
logarithm rides in the lanes of q that belong to other heads, against ones in k, and minus the sum of gradient times
output in those of the gradient, against ones in v. One product then is the exponent of a weight, the other the factor
that turns the weight into the slope of its logit; between products an element costs an exponential, a multiplication
and two roundings. The three products behind them stream a head's 72 transposed channels past the tile, which is what
the matrix unit holds: as [tile, 128] they would leave half of it empty.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from opensora_jax.kernels import tpu_channels
from opensora_jax.kernels.tpu_lanes import LANES, ROWS_BY_ROWS, Heads, choose, dot

# v6e, 2026-11-29: bundles for a head of 1024 tokens; 256 x 512 4232, 512 x 256 4400, 1024 x 256 5000.
KEY_TILE = QUERY_TILE = 256


class Keys(NamedTuple):
    """Operands of one head: [keys, 128], [keys, 128], [dim, keys]."""

    k: Any
    v: Any
    k_t: Any


class Queries(NamedTuple):
    """The same of some queries: [queries, 128] twice, [dim, queries] twice."""

    q: Any
    do: Any
    q_t: Any
    do_t: Any


def key_operands(heads: Heads, head: int, k, v, shown) -> Keys:
    """k: float32 and scaled, v as it lies; shown(rows): zero where no query sees them. Slopes of hidden keys are zero, their dv
    is not to be used."""
    mark, own = tpu_channels.marks(heads)[head], functools.partial(heads.within, head)
    met = choose(lambda lane: lane & ~1 == mark, jnp.ones_like(k), jnp.zeros_like(k))
    k, v = choose(own, k, met).astype(v.dtype), choose(own, v, met.astype(v.dtype))
    k, v = shown(k), shown(v)
    return Keys(k, v, _turned(heads, head, k))


def query_operands(heads: Heads, head: int, q, do, logs, deltas, exists) -> Queries:
    """logs, deltas: marks (tpu_channels.py) of minus the logarithms and minus the sums of gradient times output; those of
    other heads meet zeros. exists(rows): zero beyond the last one."""
    own = functools.partial(heads.within, head)
    q, do = (exists(choose(own, x, marks)) for x, marks in ((q, logs), (do, deltas)))
    return Queries(q, do, _turned(heads, head, q), _turned(heads, head, do))


def _turned(heads: Heads, head: int, x):
    """[dim, rows]; two halves of a head join in float32, whose registers hold as many rows as they begin at."""
    return heads.take_rows(x.T.astype(jnp.float32), head).astype(x.dtype)


def deltas(heads: Heads, do, out, spread, dtype):
    """do, out: a slice of lanes → [rows, n]; of all heads, as marks."""
    sums = 0.0
    for start in range(0, heads.channels, 2 * LANES):
        lanes = slice(start, min(start + 2 * LANES, heads.channels))
        product = do(lanes).astype(jnp.float32) * out(lanes).astype(jnp.float32)
        sums = sums + dot(product.astype(dtype), spread[:, lanes], ROWS_BY_ROWS)
    return tpu_channels.split(-sums, dtype)


def cuts(size: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, size)) for start in range(0, size, most)]


def products(keys: Keys, queries: Queries, at_key: slice, at_query: slice):
    """Exponents, and what makes slopes of weights."""
    of = lambda a, b: dot(a[at_key], b[at_query], ROWS_BY_ROWS)
    return of(keys.k, queries.q), of(keys.v, queries.do)


def slopes(exponents, factors, dtype):
    """Weights, and gradients of the logits."""
    weights = jnp.exp2(exponents)
    return weights.astype(dtype), (weights * factors).astype(dtype)


def gradients(keys: Keys, queries: Queries, at_key: slice, at_query: slice, weights, slope):
    """Of v, k and q, transposed; k's scale is in q's, and not in k's. In this order: any other takes 7% more bundles."""
    dv, dk = (dot(x[:, at_query], y, ROWS_BY_ROWS) for x, y in ((queries.do_t, weights), (queries.q_t, slope)))
    return dv, dk, dot(keys.k_t[:, at_key], slope)


def pipeline(items: list, *stages) -> None:
    """Every item through all stages, each beside the stage before of the item that follows: one tile's products run beside
    another's exponentials."""
    for step in range(len(items) + len(stages) - 1):
        for behind, stage in enumerate(stages):
            if 0 <= step - behind < len(items):
                stage(*items[step - behind])
