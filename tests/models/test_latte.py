import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.models import latte
from opensora_jax.nn.params import Network
from opensora_jax.weights import engine
from tests import checks
from tests.models import denoisers

TINY = dict(condition="label_5", depth=3)


@pytest.mark.parametrize("case", ["v10_latte_label", "latte_vchitect_class", "latte_vchitect_t2v"])
def test_recorded(goldens, case):
    checks.check_case(goldens, case)


@pytest.mark.parametrize("condition, preset", [("text", "Latte-XL/2"), ("class", "Latte-XL/2-class")])
def test_manifest(goldens, condition, preset):
    """Its names are DiT's, so only the config tells them apart; here the config is silent about the class."""
    import json

    path = checks.existing(goldens.parent / "manifests" / f"Latte-XL_2_16x256x256-{condition}.json")
    manifest = json.loads(path.read_text())
    shapes = {key: tuple(shape) for key, shape in (manifest["parameters"] | manifest["buffers"]).items()}
    _, table = checks.modules("models", "latte")
    _, dit = checks.modules("models", "dit")
    named = {"_class_name": "Latte"}
    assert table.recognise(shapes, named) and not dit.recognise(shapes, named) and dit.recognise(shapes, {})
    cfg = latte.Config(**table.config_from(shapes, manifest["config"]))
    assert cfg == latte.PRESETS[preset]
    network = Network.of(lambda rngs: latte.build(cfg, rngs=rngs))
    engine.plan(shapes, checks.ours(network), table.RULES)
    assert network.count() == manifest["total_params"]


def test_gradients():
    denoisers.gradients_reach_everything("latte", **TINY)


def test_scan():
    """An odd depth: pairs in a scan, and one spatial block after them."""
    denoisers.scan_equals_unrolled("latte", **TINY)


def test_dropped_class():
    denoisers.dropped_text_is_null("latte", **TINY)


def test_one_block_is_spatial():
    _, _, params, given, run = denoisers.tiny("latte", **TINY | {"depth": 1})
    difference = jnp.abs(run(params, given | {"x": given["x"].at[:, 0].add(1)})[0] - run(params, given)[0])
    assert float(difference[:, 0].max()) > 1e-3 and not difference[:, 1:].any()


def test_flat_text_does_not_reach_the_last_layer():
    """Vchitect's extras=78: with blocks that do nothing the text is not seen."""
    cfg = latte.Config(
        **denoisers.TINY, condition="flat_text", caption_channels=4, model_max_length=3, patch_size=(2, 2)
    )
    network = Network.of(lambda rngs: latte.build(cfg, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), network.abstract)
    given = denoisers.arrays(latte.inputs(cfg, denoisers.SHAPE), rng)
    assert given["y"].shape == (2, 3, 4)
    run = jax.jit(lambda params, given: network(params, **given))
    other = given | {"y": given["y"] + 1}
    assert float(jnp.abs(run(params, given) - run(params, other)).max()) > 1e-3
    params["blocks"]["modulation"] = jax.tree.map(jnp.zeros_like, params["blocks"]["modulation"])
    np.testing.assert_array_equal(run(params, given), run(params, other))


def test_names_of_flat_text_and_of_no_condition():
    _, table = checks.modules("models", "latte")
    for options in (dict(condition="flat_text", caption_channels=768), dict(condition="none")):
        cfg = latte.Config(hidden_size=144, depth=2, num_heads=2, patch_size=(2, 2), **options)
        network = Network.of(lambda rngs, cfg=cfg: latte.build(cfg, rngs=rngs))
        hollow = lambda path, network=network: np.broadcast_to(np.int8(0), checks.ours(network)[path])
        names = dict(engine.reference_arrays(checks.ours(network), hollow, table.RULES))
        shapes = {name: array.shape for name, array in names.items()} | {"temp_embed": (1, 4, 144)}
        assert table.recognise(shapes, {})
        assert latte.Config(**table.config_from(shapes, {})) == cfg
        assert ("text_embedding_projection.1.weight" in shapes) == (cfg.condition == "flat_text")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no_temporal_pos_emb"):
        latte.Config(no_temporal_pos_emb=True)
