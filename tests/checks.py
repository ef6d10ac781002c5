"""What every network with published weights is asked: recorded activations, full-size names and counts, round trips."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.nn.params import Network
from opensora_jax.verify.__main__ import adapters, verify_case
from opensora_jax.verify.case import Case
from opensora_jax.weights import engine


def check_case(goldens: Path, name: str):
    """All recorded outputs within their tolerance; intermediates that we expose, too."""
    case = Case(existing(goldens / name))
    results = verify_case(case, adapters()[case.family])
    assert all(result.ok for result in results), [result for result in results if not result.ok]


def check_manifest(goldens: Path, name: str, room: str, stem: str, *, preset: str | None = None, prefix: str = ""):
    """Every full-size name maps once and back; the count of parameters is the published one; the Config that is read
    from the shapes is the preset."""
    manifest = json.loads(existing(goldens.parent / "manifests" / f"{name}.json").read_text())
    tensors = manifest["parameters"] | manifest["buffers"]
    shapes = {key.removeprefix(prefix): tuple(shape) for key, shape in tensors.items()}
    model, table = modules(room, stem)
    assert table.recognise(shapes, {})
    cfg = model.Config(**table.config_from(shapes, manifest["config"]))
    if preset is not None:
        assert cfg == model.PRESETS[preset]
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    plan = engine.plan(shapes, ours(network), table.RULES)
    assert network.count() == manifest["total_params"]
    hollow = lambda path: np.broadcast_to(np.int8(0), ours(network)[path])
    back = {key: array.shape for key, array in engine.reference_arrays(ours(network), hollow, table.RULES)}
    lost = {*plan.dropped, *(key for key, _ in plan.tied)}
    assert back == {key: shape for key, shape in shapes.items() if key not in lost}


def check_round_trip(weights: dict[str, np.ndarray], room: str, stem: str, config: dict):
    """Reference → ours → reference, bitwise."""
    model, table = modules(room, stem)
    shapes = {key: array.shape for key, array in weights.items()}
    cfg = model.Config(**table.config_from(shapes, config))
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    plan = engine.plan(shapes, ours(network), table.RULES)
    arrays = dict(plan.arrays(weights.__getitem__))
    back = dict(engine.reference_arrays(ours(network), arrays.__getitem__, table.RULES))
    lost = {*plan.dropped, *(key for key, _ in plan.tied)}
    assert set(back) == set(weights) - lost
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)


def random_params(network: Network, seed: int = 0) -> dict:
    """Every parameter drawn (also those that begin at zero), in numpy: compiling an initialiser costs seconds."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(0, 0.2 if leaf.ndim < 2 else 0.7 * np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf), leaf.dtype), network.abstract)


def modules(room: str, stem: str):
    return (
        importlib.import_module(f"opensora_jax.{room}.{stem}"),
        importlib.import_module(f"opensora_jax.weights.{stem}"),
    )


def ours(network: Network) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in engine.flatten(network.abstract).items()}


def existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not in the recorded set at hand")
    return path
