"""What the tests of denoisers share: recorded cases, manifests of the released sizes, and one tiny network a model,
compiled once, on which gradients, the scanned stack and dropped text are checked."""

import importlib
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn import taps
from opensora_jax.nn.params import Buffer, Fixed, Network
from opensora_jax.weights import engine

SHAPE = LatentShape(batch=2, frames=3, height=4, width=6, text_tokens=4)
TINY = dict(hidden_size=24, depth=3, num_heads=2, mlp_ratio=2.0)


def modules(stem):
    return importlib.import_module(f"opensora_jax.models.{stem}"), importlib.import_module(
        f"opensora_jax.weights.{stem}"
    )


def agrees_with_recording(folder):
    """Every output and intermediate of a recorded case, at its own tolerance."""
    from opensora_jax.verify.__main__ import adapters, verify_case
    from opensora_jax.verify.case import Case

    if not folder.exists():
        pytest.skip(f"{folder.name} is not among the recordings here")
    case = Case(folder)
    bad = [result for result in verify_case(case, adapters()[case.family]) if not result.ok]
    assert not bad, bad


def fits_manifest(stem, goldens, name, preset, **unspoken):
    """Every key of the full-size reference maps once, counts agree, and the configuration is found from shapes."""
    path = goldens.parent / "manifests" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} is not among the manifests here")
    manifest = json.loads(path.read_text())
    model, table = modules(stem)
    shapes = {key: tuple(shape) for key, shape in (manifest["parameters"] | manifest["buffers"]).items()}
    assert table.recognise(shapes, manifest["config"])
    cfg = model.PRESETS[preset]
    assert model.Config(**table.config_from(shapes, manifest["config"]) | unspoken) == cfg
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    wanted = {path: leaf.shape for path, leaf in engine.flatten(network.abstract).items()}
    plan = engine.plan(shapes, wanted, table.RULES)
    placed = sum(len(item.sources) for item in plan.assignments)
    assert placed + len(plan.dropped) + len(plan.tied) == len(shapes)
    assert network.count() == manifest["total_params"]


@cache
def tiny(stem, **overrides):
    """A network with every parameter random (zero initialisations would hide what they multiply), its inputs, and one
    compiled function (params, arrays) → (output, gradients of a random projection of it)."""
    model, _ = modules(stem)
    cfg = model.Config(**TINY | overrides)
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), network.abstract)
    return cfg, network, params, arrays(model.inputs(cfg, SHAPE), rng), _compiled(network)


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
    none, second = jnp.array([False, False]), jnp.array([False, True])
    y = given["y"]
    null = params["y_embedder"]["null"][: y.shape[1]] if y.ndim == 3 else network.module(params).y_embedder.null_id
    dropped = run(params, given | {"drop_text": second})[0]
    replaced = run(params, given | {"y": y.at[1].set(null), "drop_text": none})[0]
    np.testing.assert_array_equal(dropped, replaced)
    assert not np.allclose(dropped[1], run(params, given | {"drop_text": none})[0][1])
