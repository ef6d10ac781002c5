"""What surrounds the attention of a DiT block: a modulated norm (adaLN) in front of a product, a gate behind one.

    qkv, x = linear(x_btsc, shift, scale, kernel, bias)                     # h W + b,  h = norm(x) (1 + scale) + shift
    qkv, x = linear(x_btsc, shift, None, kernel, bias)                      # h W + b,  h = x + shift, no norm
    q, x = linear(x_btsc, None, None, kernel, bias)                         # x W + b
    x = project(x_btsc, a_btsc, gate, kernel, bias)                         # x + gate (a W + b); the gate may be None
    x = mlp(x_btsc, shift, scale, gate, (kernel1, bias1), (kernel2, bias2))  # x + gate (gelu(h W1 + b1) W2 + b2)

Shift, scale and gate are [B or 1, 1 or T, 1, C], the norm is a layer norm without weights, the activation the
tanh form of GELU. `linear` hands the stream on, unchanged: what uses it afterwards takes it from there, so that its gradient
comes in with that of the product, and one pass adds them up. On a TPU each is one kernel, forward and backward: the norm's
passes over the stream and the MLP's hidden activations stay in fast memory. Backward keeps inputs only; weights' gradients are
XLA's products. Elsewhere XLA runs the composition below.
"""

from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from opensora_jax.kernels import modulated_tpu, modulated_tpu_backward, spec
from opensora_jax.kernels.sharded import over_mesh
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.parallel import shard

VECTORS = ("shift", "scale", "gate")
STREAMS = ("x", "a")
STREAM = ("batch", "frames", "space", None)
CUTS_WEIGHTS = ("heads", "mlp")  # logical axes: where a mesh cuts along them, the compiler partitions the products


def linear(x, shift, scale, kernel, bias, *, eps: float = 1e-6, implementation: str | None = None):
    arrays = {"x": x, "shift": shift, "scale": scale, "kernel": kernel, "bias": bias}
    return _run("linear", arrays, (kernel.shape[1], x.shape[-1]), eps, implementation)


def project(x, a, gate, kernel, bias, *, name: str | None = None, implementation: str | None = None):
    """name: of `a`, under which remat policies find it."""
    arrays = {"x": x, "a": a, "gate": gate, "kernel": kernel, "bias": bias}
    return _run("project", arrays, x.shape[-1], None, implementation, {} if name is None else {"a": name})


def mlp(x, shift, scale, gate, first, second, *, eps: float = 1e-6, implementation: str | None = None):
    arrays = {"x": x, "shift": shift, "scale": scale, "gate": gate, "first": first, "second": second}
    return _run("mlp", arrays, x.shape[-1], eps, implementation)


def composed_linear(x, shift, scale, kernel, bias, *, eps):
    return _project(_modulated(x, shift, scale, eps), kernel, bias), x


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


def _run(name, arrays, outputs, eps, implementation, kept=MappingProxyType({})):
    """kept: names of arrays for remat policies."""
    static = {} if eps is None else {"eps": eps}
    if not _fuses(arrays, implementation):
        arrays |= {key: checkpoint_name(arrays[key], kept[key]) for key in kept}
        return COMPOSED[name](**arrays, **static)
    # Weights travel to every device in the dtype that they are used in.
    weights = {key: a for key, a in arrays.items() if key not in (*STREAMS, *VECTORS)}
    arrays = arrays | jax.tree.map(lambda a: a.astype(arrays["x"].dtype), weights)
    x = arrays["x"]
    vector = ("batch", "frames", None, None)
    names = {key: STREAM for key in STREAMS if key in arrays} | {key: vector for key in VECTORS if key in arrays}
    names |= jax.tree.map(lambda a: (None,) * a.ndim, weights)
    shape = jax.tree.map(lambda width: (*x.shape[:3], width), outputs)
    out_names = jax.tree.map(lambda _: STREAM, outputs)
    run = _differentiable(name, tuple(arrays), static, kept)
    return over_mesh(lambda **given: run(*(given[key] for key in arrays)), arrays, names, shape, out_names)


def _differentiable(name: str, order: tuple[str, ...], static: dict, kept):
    """The kernel of the arrays in this order."""

    hands_on, x = name == "linear", order.index("x")

    @jax.custom_vjp
    def run(*values):
        y = getattr(modulated_tpu, name)(**dict(zip(order, values)), **static)
        return (y, values[x]) if hands_on else y

    def forward(*values):
        values = [spec.kept(a, kept.get(key)) for key, a in zip(order, values)]
        # Not the kernel itself: jax never drops one whose result is not read, as that of a repeated forward pass may be.
        y = run(*values)
        return ((y[0], values[x]) if hands_on else y), values

    def backward(values, d):
        gradients = getattr(modulated_tpu_backward, name)
        return gradients(*values, *(d if hands_on else (d,)), **static)

    run.defvjp(forward, backward)
    return run


COMPOSED = {"linear": composed_linear, "project": composed_project, "mlp": composed_mlp}


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
