"""Networks under `context`: output and gradients on 2, 4 and 8 devices a sequence equal those of one device, in float32.

Three frames of 2 x 3 positions: 18 tokens, which divide by two and not by four or eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.params import Network
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from tests.checks import modules, random_params
from tests.models.denoisers import TINY, arrays

TEXT = dict(caption_channels=8)
FAMILIES = {
    "dit": TINY | TEXT,
    "pixart": TINY | TEXT | dict(model_max_length=4, qk_norm=True, kv_compress_factor=2, kv_compress_layers=(1,)),
    "mmdit": dict(
        in_channels=8, vec_in_dim=6, context_in_dim=10, hidden_size=24, num_heads=2, depth=1, depth_single_blocks=2,
        axes_dim=(4, 4, 4), mlp_ratio=2.0,
    ),
    "latte": TINY | TEXT,
    "latte_t2v": dict(hidden_size=24, depth=2, num_heads=2, sample_size=(4, 4), video_length=3) | TEXT,
    "stdit3_v13": TINY | TEXT | dict(in_channels=4, model_max_length=5, kernel_size=(2, 2, -1), use_spatial_rope=True),
}  # fmt: skip
SHAPE = LatentShape(batch=2, frames=3, height=4, width=6, text_tokens=5)


class Subject:
    def __init__(self, stem):
        model, _ = modules("models", stem)
        cfg = model.Config(**FAMILIES[stem])
        self.network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
        self.params = random_params(self.network)
        given = arrays(model.inputs(cfg, SHAPE), np.random.default_rng(0))
        self.given = {name: np.asarray(a) for name, a in given.items()}
        self.alone = jax.device_get(jax.jit(self.run)(self.params, self.given))

    def run(self, params, given):
        def projection(params):
            out = self.network(params, **given)
            return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum(), out

        grads, out = jax.grad(projection, has_aux=True)(params)
        return out, grads

    def on(self, layout):
        with shard.use(layout):
            where = shard.shardings(self.network.abstract, self.network.axes, layout)
            run = jax.jit(self.run, out_shardings=(None, where))
            return jax.device_get(run(jax.device_put(self.params, where), shard.place_batch(self.given, layout)))


@pytest.fixture(scope="module")
def subject():
    known = {}

    def of(stem):
        if stem not in known:
            known[stem] = Subject(stem)
        return known[stem]

    return of


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("stem", FAMILIES)
def test_context_changes_nothing(subject, stem, width):
    data = 8 // max(width, 4)
    layout = shard.layout(make_mesh(MeshConfig(data=data, fsdp=-1, context=width)), "fsdp_context")
    (out, grads), (expected, wanted) = subject(stem).on(layout), subject(stem).alone
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    scale = np.sqrt(np.mean([np.mean(b**2) for b in jax.tree.leaves(wanted)]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-3 * scale * np.sqrt(b.size))
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error:.1e}"
