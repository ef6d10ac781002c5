"""One check for every back end: the output and all gradients against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.reference import attention64, gradients64, stdit64

# Largest error relative to the largest entry. Operands and weights of bfloat16 carry 8 bits: 2^-8 = 4e-3 each.
FORWARD = {"float32": 5e-6, "bfloat16": 1.5e-2}
GRADIENT = {"float32": 2e-5, "bfloat16": 3e-2}


def relative(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(ours - reference).max() / max(np.abs(reference).max(), 1e-30))


def both(run, cotangent, *arrays):
    """The output and the gradients of the arrays, compiled as one (a property test meets many shapes)."""

    @jax.jit
    def call(cotangent, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(cotangent)

    return call(cotangent, *arrays)


def check(case, dtype: str, run):
    """`run(*arrays, **options)` on a case: the output, and gradients of arrays and norm weights."""
    arrays, extras = case.inputs(dtype=jnp.dtype(dtype))
    norm = {name: extras.pop(name) for name in ("q_scale", "k_scale") if name in extras}
    exact = stdit64 if case.fused else attention64
    wide = [np.asarray(x.astype(jnp.float32)) for x in arrays]
    cotangent = jax.random.normal(jax.random.key(3), exact(*wide, **norm, **extras).shape).astype(dtype)

    attend = lambda norm, *arrays: run(*arrays, **norm, **extras)
    out, gradients = both(attend, cotangent, norm, *arrays)
    assert out.dtype == jnp.dtype(dtype)
    assert relative(out, exact(*wide, **norm, **extras)) < FORWARD[dtype]
    expected = gradients64(exact, cotangent.astype(jnp.float32), norm, tuple(wide), **extras)
    for ours, reference in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert relative(ours.astype(jnp.float32), reference) < GRADIENT[dtype]
