"""What the tests of denoisers share: one tiny network a model, compiled once, on which gradients, the scanned stack and
dropped text are checked."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn import taps
from opensora_jax.nn.params import Buffer, Fixed, Network
from opensora_jax.weights import engine
from tests.checks import modules

SHAPE = LatentShape(batch=2, frames=3, height=4, width=6, text_tokens=4)
TINY = dict(hidden_size=24, depth=2, num_heads=2, mlp_ratio=2.0)


@cache
def tiny(stem, **overrides):
    """A network with every parameter random (zero initialisations would hide what they multiply), its inputs, and one
    compiled function (params, arrays) → (output, gradients of a random projection of it)."""
    model, _ = modules("models", stem)
    cfg = model.Config(**TINY | overrides)
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), network.abstract)
    given = arrays(model.inputs(cfg, SHAPE), rng) | {"drop_text": jnp.array([False, False])}
    return cfg, network, params, given, _compiled(network)


def _compiled(network):
    @jax.jit
    def run(params, given):
        def projection(params):
            out = network(params, **given)
            return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum(), out

        return jax.grad(projection, has_aux=True)(params)[::-1]

    return run


def arrays(specs, rng):
    """Plausible values for the inputs of a network."""
    ranges = {"t": (0, 999), "height": (144, 480), "width": (144, 480), "fps": (8, 30), "num_frames": (1, 64)}

    def value(name, spec):
        if name == "text_mask":
            return jnp.arange(spec.shape[1])[None] < jnp.asarray([[2], [4]])
        if spec.dtype == bool:
            return jnp.asarray([[True] + [False] * (spec.shape[1] - 1), [True] * spec.shape[1]])
        if np.issubdtype(spec.dtype, np.integer):
            return jnp.asarray(rng.integers(0, 3, spec.shape), spec.dtype)
        low_high = ranges.get(name)
        return jnp.asarray(rng.uniform(*low_high, spec.shape) if low_high else rng.normal(size=spec.shape), spec.dtype)

    return {name: value(name, spec) for name, spec in specs.items()}


def gradients_reach_everything(stem, *, except_for=(), **overrides):
    """All trained parameters receive a finite, nonzero gradient."""
    cfg, network, params, given, run = tiny(stem, **overrides)
    out, grads = run(params, given)
    assert bool(jnp.isfinite(out).all())
    flat, kinds = engine.flatten(grads), engine.flatten(network.kinds)
    dead = [path for path, grad in flat.items() if not float(jnp.abs(grad).max()) > 0 or not jnp.isfinite(grad).all()]
    unused = [path for path in dead if kinds[path] not in (Buffer, Fixed) and path not in except_for]
    assert not unused


def scan_equals_unrolled(stem, **overrides):
    """The stack as one scan, and layer by layer as it runs while recording."""
    cfg, network, params, given, run = tiny(stem, **overrides)
    with taps.record():
        unrolled = jax.jit(lambda params, given: network(params, **given))(params, given)
    np.testing.assert_allclose(run(params, given)[0], unrolled, rtol=2e-5, atol=2e-5 * float(jnp.abs(unrolled).max()))


def dropped_text_is_null(stem, **overrides):
    """drop_text replaces the whole caption (or label) of a sample by the learned null, and no other sample's."""
    cfg, network, params, given, run = tiny(stem, **overrides)
    y = given["y"]
    null = params["y_embedder"]["null"][: y.shape[1]] if y.ndim == 3 else network.module(params).y_embedder.null_id
    dropped = run(params, given | {"drop_text": jnp.array([False, True])})[0]
    replaced = run(params, given | {"y": y.at[1].set(null)})[0]
    np.testing.assert_array_equal(dropped, replaced)
    assert not np.allclose(dropped[1], run(params, given)[0][1])
