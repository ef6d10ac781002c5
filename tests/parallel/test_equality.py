"""Loss and gradients do not depend on the mesh: one device against eight, for every rule preset, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.pipeline import assemble
from opensora_jax.trainer import Trainer
from tests.parallel.conftest import MESHES, layout_of

ROWS, TEXT = 8, 16
SIZES = {"even": (4, 8, 8), "uneven": (5, 6, 6)}  # latent frames, height, width; 16 and 9 positions of a frame


def batch_of(size):
    rng = np.random.default_rng(1)
    frames = size[0]
    return {
        "latents": rng.standard_normal((ROWS, *size, 4), np.float32),
        "text_emb": rng.standard_normal((ROWS, TEXT, 32), np.float32),
        "text_mask": (np.arange(TEXT) < 3 + np.arange(ROWS)[:, None]).astype(np.int32),
        "x_mask": np.arange(frames) >= np.arange(ROWS)[:, None] % 2,
        "fps": np.full(ROWS, 8, np.float32),
        "height": np.full(ROWS, 32, np.float32),
        "width": np.full(ROWS, 32, np.float32),
        "num_frames": np.full(ROWS, 17, np.float32),
    }


def noisy(params):
    """Some layers begin at zero and would hide what happens before them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.asarray(p) + 0.05 * rng.standard_normal(p.shape).astype(p.dtype), params)


class Subject:
    """The debug run's loss and its gradients on any layout."""

    def __init__(self, cfg):
        self.cfg = cfg
        network = self.trainer(shard.layout(make_mesh(MeshConfig(data=1), jax.devices()[:1]), "dp")).network
        self.network, self.params = network, noisy(shard.draw(network, jax.random.key(0)))

    def trainer(self, layout):
        return Trainer(self.cfg, assemble(self.cfg, weightless=True), layout)

    def __call__(self, layout, size):
        with shard.use(layout):
            where = shard.shardings(self.network.abstract, self.network.axes, layout)
            loss_fn = self.trainer(layout).loss_fn()
            run = jax.jit(
                lambda params, batch: jax.value_and_grad(lambda p: loss_fn(p, batch, jax.random.key(3), {})[0])(params),
                out_shardings=(layout.replicated(), where),
            )
            params = jax.device_put(self.params, where)
            return run(params, shard.place_batch(batch_of(size), layout))


@pytest.fixture(scope="module")
def subject(debug):
    return Subject(debug)


@pytest.fixture(scope="module")
def alone(subject):
    found = {}

    def run(name):
        if name not in found:
            layout = shard.layout(make_mesh(MeshConfig(data=1), jax.devices()[:1]), "dp")
            found[name] = jax.device_get(subject(layout, SIZES[name]))
        return found[name]

    return run


@pytest.mark.parametrize(
    ("preset", "size"), [*((p, "even") for p in MESHES if p != "zero"), ("fsdp_context", "uneven")]
)
def test_loss_and_gradients_equal_those_of_one_device(subject, alone, preset, size):
    loss, grads = subject(layout_of(preset), SIZES[size])
    expected_loss, expected = alone(size)
    cut = [leaf for leaf in jax.tree.leaves(grads) if not leaf.sharding.is_fully_replicated]
    assert bool(cut) == (preset != "dp"), "gradients are cut like the parameters"
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    pairs = list(zip(jax.tree.leaves(jax.device_get(grads)), jax.tree.leaves(expected)))
    whole = np.sqrt(sum(np.sum(b**2) for _, b in pairs))
    assert np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs)) / whole < 1e-5
    worst = max(
        (np.linalg.norm(a - b) / np.linalg.norm(b), path) for (a, b), path in zip(pairs, paths) if np.linalg.norm(b)
    )
    assert worst[0] < 1e-4, worst
    assert sum(jnp.size(b) for _, b in pairs if np.linalg.norm(b)) > 0.9 * sum(jnp.size(b) for _, b in pairs)
