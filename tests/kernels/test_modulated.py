"""Norm, modulation and products as one TPU kernel: in the interpreter against float64, under a mesh, lowered to Mosaic."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import work
from opensora_jax.kernels import modulated, spec
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.nn.stack import run_stack
from opensora_jax.parallel import shard
from tests.kernels.compare import FORWARD, GRADIENT, relative

C = 128


def inputs(frames, positions, vectors, dtype=jnp.bfloat16):
    """x, (shift, scale, gate), ((kernel, bias) of the MLP's halves)."""
    keys = iter(jax.random.split(jax.random.key(0), 12))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    layer = lambda width, out: (normal(width, out) / width**0.5, normal(out))
    x = (3 + normal(2, frames, positions, C)).astype(dtype)
    return x, [normal(2, vectors, 1, C) for _ in range(3)], [layer(C, 4 * C), layer(4 * C, C)]


def float64(x, shift, scale, gate, first, second):
    """The MLP, and the product that its first half is before the activation."""
    wide = lambda a: np.asarray(jnp.asarray(a, jnp.float32), np.float64)
    x, shift, scale, gate = map(wide, (x, shift, scale, gate))
    h = x - x.mean(-1, keepdims=True)
    h = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    product = h @ wide(first[0]) + wide(first[1])
    hidden = 0.5 * product * (1 + np.tanh(np.sqrt(2 / np.pi) * (product + 0.044715 * product**3)))
    return x + gate * (hidden @ wide(second[0]) + wide(second[1])), product


@pytest.mark.parametrize("frames, positions, vectors", [(3, 24, 3), (2, 530, 1)])  # many frames a block; ragged blocks
def test_matches_float64(frames, positions, vectors):
    x, (shift, scale, gate), (first, second) = inputs(frames, positions, vectors)
    mlp, linear = float64(x, shift, scale, gate, first, second)
    ours = modulated.mlp(x, shift, scale, gate, first, second, implementation="pallas_tpu")
    assert ours.dtype == jnp.bfloat16 and relative(ours.astype(jnp.float32), mlp) < FORWARD["bfloat16"]
    ours, handed_on = modulated.linear(x, shift, scale, *first, implementation="pallas_tpu")
    assert handed_on is x or (handed_on == x).all()
    assert relative(ours.astype(jnp.float32), linear) < FORWARD["bfloat16"]
    ours, reference = (
        modulated.linear(x, shift[:1], None, *first, implementation=name)[0] for name in ("pallas_tpu", "xla")
    )
    assert relative(ours.astype(jnp.float32), reference.astype(jnp.float32)) < FORWARD["bfloat16"]


@pytest.mark.parametrize("gated", [True, False])
def test_projection_onto_a_stream_matches_float64(gated):
    x, (_, _, gate), (_, layer) = inputs(3, 24, 3)
    a = jax.random.normal(jax.random.key(1), (2, 3, 24, 4 * C)).astype(x.dtype)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    exact = wide(x) + (wide(gate) if gated else 1) * (wide(a) @ wide(layer[0]) + wide(layer[1]))
    for implementation in ("pallas_tpu", "xla"):
        ours = modulated.project(x, a, gate if gated else None, *layer, implementation=implementation)
        assert ours.dtype == jnp.bfloat16 and relative(ours.astype(jnp.float32), exact) < FORWARD["bfloat16"]


def test_composition_matches_float64():
    x, vectors, layers = inputs(2, 5, 2, jnp.float32)
    mlp, linear = float64(x, *vectors, *layers)
    assert relative(modulated.mlp(x, *vectors, *layers), mlp) < FORWARD["float32"]
    assert relative(modulated.linear(x, *vectors[:2], *layers[0])[0], linear) < FORWARD["float32"]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "frames, positions, vectors", [(3, 24, 3), (9, 24, 9), (2, 530, 1)]
)  # ragged in frames, positions
def test_gradients_match_float64(frames, positions, vectors, gated):
    x, (shift, scale, gate), (first, second) = inputs(frames, positions, vectors)
    gate, one = gate if gated else None, shift[:1]  # one: shared by all samples
    a = jax.random.normal(jax.random.key(1), (*x.shape[:3], 4 * C)).astype(x.dtype)
    check_gradients(modulated.composed_linear, modulated.linear, x, shift, scale, *first)
    check_gradients(modulated.composed_linear, modulated.linear, x, one, None, *first)
    check_gradients(modulated.composed_linear, modulated.linear, x, None, None, *first)
    check_gradients(modulated.composed_project, modulated.project, x, a, gate, *second)
    check_gradients(modulated.composed_mlp, modulated.mlp, x, one, scale, gate, first, second)


def check_gradients(composed, fused, *arrays):
    """Of a sum of all results with random factors, against the composition in float64. Weights travel in bfloat16, and so do
    their gradients."""
    static = {} if fused is modulated.project else {"eps": 1e-6}
    arrays = jax.tree.map(lambda a: a if a.ndim == 4 else a.astype(jnp.bfloat16), arrays)
    results = jax.tree.leaves(jax.eval_shape(lambda *arrays: composed(*arrays, **static), *arrays))
    keys = jax.random.split(jax.random.key(2), len(results))
    factors = [jax.random.normal(key, r.shape).astype(jnp.bfloat16) for key, r in zip(keys, results)]

    def gradients(run, factors, arrays):
        loss = lambda arrays: sum(jnp.vdot(r, f) for r, f in zip(jax.tree.leaves(run(*arrays)), factors, strict=True))
        return jax.tree.leaves(jax.grad(loss)(arrays))

    ours = jax.jit(lambda arrays: gradients(functools.partial(fused, implementation="pallas_tpu"), factors, arrays))(
        arrays
    )
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a.astype(jnp.float32)), jnp.float64), tree)
        exact = gradients(functools.partial(float64_composition, composed, static), wide(factors), wide(arrays))
    for d, expected, a in zip(ours, exact, jax.tree.leaves(arrays), strict=True):
        assert d.dtype == a.dtype and d.shape == a.shape
        assert relative(d.astype(jnp.float32), expected) < GRADIENT["bfloat16"]


def float64_composition(composed, static, *arrays):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        return composed(*arrays, **static)


def test_weights_that_stand_still_cost_no_product():
    x, (shift, scale, gate), (first, second) = inputs(2, 16, 2)
    loss = lambda weights, x: modulated.mlp(
        x, shift, scale, gate, *weights, implementation="pallas_tpu"
    ).astype(jnp.float32).sum()  # fmt: skip

    def flops(*trained):
        gradients = jax.jit(jax.grad(loss, argnums=trained))
        return gradients.lower((first, second), x).compile().cost_analysis()["flops"]

    products = 2 * 2 * x.size // C * C * 4 * C  # of both kernels' gradients
    assert flops(0, 1) - flops(1) == pytest.approx(products, rel=0.05)


def test_policies_decide_what_runs_again():
    """Forward by kernels, and again only what the backward pass asks for: of the MLP, the last of a layer, nothing."""
    x, (shift, scale, gate), layers = inputs(2, 16, 2)
    layers = jax.tree.map(lambda a: a[None], layers)

    def layer(x, layers):
        first, second = layers
        q, x = modulated.linear(x, shift, scale, *first)
        x = modulated.project(x, q, gate, *second, name="spatial_out")
        return modulated.mlp(x, shift, scale, gate, first, second)

    def calls(remat):
        loss = lambda x, layers: run_stack(layer, x, layers, remat=remat).astype(jnp.float32).sum()
        with spec.target("v6e"):  # in the interpreter, calls whose results nobody reads stay
            kernels = work.count(jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, layers).jaxpr).kernels
        return Counter(kernel.name.removeprefix("modulated_") for kernel in kernels)

    backward = {"linear_backward": 1, "project_backward": 1, "mlp_backward": 1}
    assert calls("none") == {"linear": 1, "project": 1, "mlp": 1} | backward
    assert calls("spatial") == {"linear": 1, "project": 2, "mlp": 1} | backward
    assert calls("full") == {"linear": 2, "project": 2, "mlp": 1} | backward


@pytest.mark.parametrize("function", ["linear", "project", "mlp"])
def test_under_a_mesh_with_gradients(function):
    x, (shift, scale, gate), (first, second) = inputs(4, 16, 4)
    a = jnp.tile(x, 4)
    given = {
        "linear": (shift, scale, *first),
        "project": (a, gate, *second),
        "mlp": (shift, scale, gate, first, second),
    }
    mesh = jax.make_mesh(
        (2, 2, 2, 1), ("data", "fsdp", "context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 4
    )

    def run(name, dtype):
        call = functools.partial(getattr(modulated, function), implementation=name)

        def both(*arrays):
            out, pull = jax.vjp(call, *arrays)
            return out, pull(out)

        arrays = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == x.dtype else a, (x, *given[function]))
        return jax.tree.leaves(jax.jit(both)(*arrays))

    expected, composed = run("xla", jnp.float32), run("xla", x.dtype)
    with shard.use(shard.layout(mesh, "fsdp_context")):
        found = run("pallas_tpu", x.dtype)
    assert len(found[0].sharding.device_set) == 8
    results = 2 if function == "linear" else 1
    bounds = [FORWARD["bfloat16"]] * results + [GRADIENT["bfloat16"]] * (len(found) - results)
    for ours, exact, other, bound in zip(found, expected, composed, bounds, strict=True):
        assert ours.dtype == other.dtype and relative(ours.astype(jnp.float32), exact) < bound


def test_lowers_to_mosaic_at_full_size():
    array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
    layer = lambda width, out: (array(width, out, dtype="float32"), array(out, dtype="float32"))
    arrays = [array(1, 64, 128, 1152), *[array(1, 64, 1, 1152, dtype="float32")] * 3]
    arrays += [layer(1152, 4608), layer(4608, 1152)]
    count = lambda f: jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
    with spec.target("v6e"):
        assert count(modulated.mlp) == 1
        assert count(jax.grad(lambda *a: modulated.mlp(*a).astype(jnp.float32).sum())) == 1  # nothing forward is needed


def test_what_does_not_fit_is_refused_with_the_reason():
    x, vectors, layers = inputs(2, 16, 1, jnp.float32)
    with pytest.raises(Unsupported, match="float32"):
        modulated.mlp(x, *vectors, *layers, implementation="pallas_tpu")
    narrow = jax.tree.map(lambda a: a[..., :72], (x.astype(jnp.bfloat16), *vectors[:2]))
    with pytest.raises(Unsupported, match="72 channels"):
        modulated.linear(*narrow, jnp.zeros((72, 216)), jnp.zeros(216), implementation="pallas_tpu")
