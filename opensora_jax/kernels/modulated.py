"""What surrounds the attention of a DiT block: a modulated norm (adaLN) in front of a product, a gate behind one.

    qkv = linear(x_btsc, shift, scale, kernel, bias)                        # h W + b,  h = norm(x) (1 + scale) + shift
    qkv = linear(x_btsc, shift, None, kernel, bias)                         # h W + b,  h = x + shift, no norm
    q = linear(x_btsc, None, None, kernel, bias)                            # x W + b
    x = project(x_btsc, a_btsc, gate, kernel, bias)                         # x + gate (a W + b); the gate may be None
    x = mlp(x_btsc, shift, scale, gate, (kernel1, bias1), (kernel2, bias2))  # x + gate (gelu(h W1 + b1) W2 + b2)

Shift, scale and gate are [B or 1, 1 or T, 1, C], the norm is a layer norm without weights, the activation the
tanh form of GELU. On a TPU without differentiation each is one kernel: the norm's passes over the stream and the MLP's
hidden activations stay in fast memory. Where gradients are taken, and elsewhere, XLA runs the composition below.
"""

import functools

import jax
import jax.numpy as jnp

from opensora_jax.kernels import modulated_tpu, spec
from opensora_jax.kernels.sharded import over_mesh
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.parallel import shard

VECTORS = ("shift", "scale", "gate")
STREAMS = ("x", "a")
STREAM = ("batch", "frames", "space", None)
CUTS_WEIGHTS = ("heads", "mlp")  # logical axes: where a mesh cuts along them, the compiler partitions the products


def linear(x, shift, scale, kernel, bias, *, eps: float = 1e-6, implementation: str | None = None):
    arrays = {"x": x, "shift": shift, "scale": scale, "kernel": kernel, "bias": bias}
    return _run(composed_linear, modulated_tpu.linear, arrays, kernel.shape[1], eps, implementation)


def project(x, a, gate, kernel, bias, *, implementation: str | None = None):
    arrays = {"x": x, "a": a, "gate": gate, "kernel": kernel, "bias": bias}
    return _run(composed_project, modulated_tpu.project, arrays, x.shape[-1], None, implementation)


def mlp(x, shift, scale, gate, first, second, *, eps: float = 1e-6, implementation: str | None = None):
    arrays = {"x": x, "shift": shift, "scale": scale, "gate": gate, "first": first, "second": second}
    return _run(composed_mlp, modulated_tpu.mlp, arrays, x.shape[-1], eps, implementation)


def composed_linear(x, shift, scale, kernel, bias, *, eps):
    return _project(_modulated(x, shift, scale, eps), kernel, bias)


def composed_project(x, a, gate, kernel, bias):
    return x + _gated(_project(a, kernel, bias), gate)


def composed_mlp(x, shift, scale, gate, first, second, *, eps):
    hidden = jax.nn.gelu(_project(_modulated(x, shift, scale, eps), *first), approximate=True)
    return x + _gated(_project(hidden, *second), gate)


def _gated(h, gate):
    return h if gate is None else (h.astype(jnp.float32) * gate).astype(h.dtype)


def _modulated(x, shift, scale, eps):
    if scale is None:
        return x if shift is None else x + shift.astype(x.dtype)
    return modulate(layer_norm(x, eps).astype(x.dtype), shift, scale)


def layer_norm(x, eps: float):
    """Mean 0 and variance 1 over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def modulate(x_normed, shift, scale):
    """x (1 + scale) + shift in float32; x [B, T, S, C], shift and scale [B, 1 or T, 1, C]."""
    y = x_normed.astype(jnp.float32) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return y.astype(x_normed.dtype)


def _project(x, kernel, bias):
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _run(composed, fused, arrays, outputs, eps, implementation):
    if eps is not None:
        composed, fused = (functools.partial(run, eps=eps) for run in (composed, fused))
    if not _fuses(arrays, implementation):
        return composed(**arrays)
    # Weights travel to every device in the dtype that they are used in.
    weights = {name: a for name, a in arrays.items() if name not in (*STREAMS, *VECTORS)}
    arrays = arrays | jax.tree.map(lambda a: a.astype(arrays["x"].dtype), weights)
    order = tuple(arrays)

    @jax.custom_vjp
    def run(*values):
        return fused(**dict(zip(order, values)))

    # Gradients through the composition: nothing is computed twice that remat policies would have kept.
    run.defvjp(lambda *values: jax.vjp(lambda *v: composed(**dict(zip(order, v))), *values), lambda pull, d: pull(d))
    x = arrays["x"]
    vector = ("batch", "frames", None, None)
    names = {name: STREAM for name in STREAMS if name in arrays} | {name: vector for name in VECTORS if name in arrays}
    names |= jax.tree.map(lambda a: (None,) * a.ndim, weights)
    return over_mesh(
        lambda **given: run(*(given[name] for name in order)), arrays, names, (*x.shape[:3], outputs), STREAM
    )


def _fuses(arrays, implementation) -> bool:
    if implementation == "xla" or (implementation is None and spec.platform() != "tpu"):
        return False
    try:
        where = shard.current()
        cut = [name for name in CUTS_WEIGHTS if where is not None and where.axes_of(name)]
        if cut:
            raise Unsupported("the mesh cuts the weights of a layer")
        modulated_tpu.supports(arrays["x"], *(a for a in jax.tree.leaves(arrays) if a.ndim == 2))
    except Unsupported:
        if implementation is not None:
            raise
        return False
    return True
