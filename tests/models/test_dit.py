import jax
import jax.numpy as jnp
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.models import dit
from tests import checks
from tests.models import denoisers

LABELS = dict(condition="label_5")
TEXT = dict(condition="text", caption_channels=8)


@pytest.mark.parametrize("case", ["v10_dit_label", "dit_orig"])
def test_recorded(goldens, case):
    checks.check_case(goldens, case)


@pytest.mark.parametrize("name, preset", [("16x256x256-text", "DiT-XL/2"), ("1x256x256-class", "DiT-XL/2-class")])
def test_manifest(goldens, name, preset):
    checks.check_manifest(goldens, f"DiT-XL_2_{name}", "models", "dit", preset=preset)


def test_the_original_s_names_and_two_dimensional_patches_survive_the_round_trip(goldens):
    from safetensors.numpy import load_file

    folder = checks.existing(goldens / "dit_orig")
    checks.check_round_trip(load_file(folder / "weights.safetensors"), "models", "dit", {"num_heads": 3})


@pytest.mark.parametrize("options", [LABELS, TEXT], ids=["labels", "text"])
def test_dropped_condition(options):
    denoisers.dropped_text_is_null("dit", **options)


def test_gradients():
    denoisers.gradients_reach_everything("dit", **TEXT)


def test_scan():
    denoisers.scan_equals_unrolled("dit", **TEXT)


def test_all_frames_see_each_other():
    _, _, params, given, run = denoisers.tiny("dit", **TEXT)
    other = run(params, given | {"x": given["x"].at[:, 0].add(1)})[0]
    assert float(jnp.abs(other - run(params, given)[0])[:, 2].max()) > 1e-3


def test_a_network_without_null_class_drops_nothing():
    _, network, _, _, _ = denoisers.tiny("dit", class_dropout_prob=0.0, **LABELS)
    assert network.abstract["y_embedder"]["table"]["embedding"].shape[0] == 5
    embedder = network.module(network.init(jax.random.key(0))).y_embedder
    with pytest.raises(ValueError, match="without a null class"):
        embedder(jnp.array([1]), jnp.array([True]))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="label_K"):
        dit.Config(condition="label_many")


def test_labels_are_read_from_the_table():
    _, table = checks.modules("models", "dit")
    shapes = {"y_embedder.embedding_table.weight": (11, 8)}
    assert table.condition(shapes, {}) == {"condition": "label_10"}
    assert table.condition(shapes, {"class_dropout_prob": 0.0})["condition"] == "label_11"
