"""Every shipped config on every rule preset: shapes and shardings only; under fsdp nothing large stays whole."""

import math
from pathlib import Path

import jax
import pytest

from opensora_jax import config
from opensora_jax.pipeline import assemble
from opensora_jax.training import optimizer
from opensora_jax.training.run import RunConfig
from opensora_jax.training.state import abstract_state
from tests.parallel.conftest import MESHES, layout_of

REPO = Path(__file__).parents[2]
CONFIGS = sorted(
    path.relative_to(REPO).as_posix()
    for path in (REPO / "configs").rglob("*.py")
    if path.stem not in ("__init__", "base")
    and "def get_config" in path.read_text()
    and path.parent.name != "sample"  # settings of sampling, not runs
)
LARGE = 2**20  # bytes


@pytest.fixture(scope="module")
def network_of():
    """Configs share networks: each is described once."""
    known = {}

    def network(part):
        if repr(part) not in known:
            known[repr(part)] = part.network()
        return known[repr(part)]

    return network


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_on_every_preset(name, network_of):
    cfg = config.build(RunConfig, config.load(name, []), "config")
    assembly = assemble(cfg, weightless=True)
    networks = {name: network_of(part) for name, part in assembly.system.parts.items()}
    trained = networks[assembly.trained]
    mask = optimizer.trainable(trained.trainable, cfg.optimizer.freeze)
    tx = optimizer.make(cfg.optimizer, cfg.steps, mask)
    for preset in MESHES:
        layout = layout_of(preset)
        for network in networks.values():
            whole = [path for path, (size, share) in cut(network, layout).items() if size > LARGE and share == size]
            assert preset in ("dp", "zero") or not whole, f"{preset}: {whole} are over 1 MiB and on every device"
        state = abstract_state(trained, tx, layout)
        if preset == "zero":
            kept = jax.tree_util.tree_leaves_with_path((state["opt"], state["ema"]))
            kept = [leaf for path, leaf in kept if 4 * leaf.size // layers_of(path, leaf) > LARGE]
            whole = [leaf.shape for leaf in kept if leaf.sharding.is_fully_replicated]
            assert not whole, f"optimizer state of shapes {whole} is on every device"
        assert jax.tree.structure(state["params"]) == jax.tree.structure(state["ema"])


def cut(network, layout) -> dict[str, tuple[int, int]]:
    """Path → bytes, and bytes on one device."""
    found = {}
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(network.abstract),
        jax.tree.leaves(network.axes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        assert len(names) == leaf.ndim, f"{path}: axes {names} of an array of shape {leaf.shape}"
        share = math.prod(layout.sharding(names, leaf.shape).shard_shape(leaf.shape))
        unit = leaf.dtype.itemsize / layers_of(path, leaf)
        found[jax.tree_util.keystr(path)] = (int(leaf.size * unit), int(share * unit))
    return found


def layers_of(path, leaf) -> int:
    """Stacked biases count by layer: those of 38 layers of 11B are 2 MiB, and stay whole."""
    return leaf.shape[0] if getattr(path[-1], "key", None) == "bias" and leaf.ndim == 2 else 1
