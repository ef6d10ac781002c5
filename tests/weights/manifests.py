"""The recorded names and shapes of full-size checkpoints against our abstract networks: no memory is touched."""

import importlib
import json

import pytest

from opensora_jax.nn.params import Network
from opensora_jax.weights import engine


def check(goldens, name: str, room: str, stem: str, **settings):
    """Every key maps exactly once and fits; parameters count as the reference counts them. Returns the Config."""
    path = goldens.parent / "manifests" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name}.json is not beside this checkout")
    manifest = json.loads(path.read_text())
    shapes = {key: tuple(shape) for key, shape in (manifest["parameters"] | manifest["buffers"]).items()}
    model = importlib.import_module(f"opensora_jax.{room}.{stem}")
    table = importlib.import_module(f"opensora_jax.weights.{stem}")
    assert table.recognise(shapes, manifest["config"])
    cfg = model.Config(**(table.config_from(shapes, manifest["config"]) | settings))
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    wanted = {path: leaf.shape for path, leaf in engine.flatten(network.abstract).items()}
    plan = engine.plan(shapes, wanted, table.RULES)
    assert sum(len(item.sources) for item in plan.assignments) + len(plan.dropped) + len(plan.tied) == len(shapes)
    assert network.count() == manifest["total_params"]
    return cfg
