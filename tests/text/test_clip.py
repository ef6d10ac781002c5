"""CLIP's text model: recorded activations, names, both rules for the end of the text, the projection."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.nn.params import Network
from opensora_jax.text import clip
from opensora_jax.verify.case import Case
from opensora_jax.weights import clip as table
from opensora_jax.weights import engine
from tests.checks import check_case, check_manifest, check_round_trip, existing, random_params

TINY = clip.Config(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=6, projection_dim=3,
)  # fmt: skip


def network(cfg):
    return Network.of(lambda rngs: clip.build(cfg, rngs=rngs))


@pytest.fixture(scope="module")
def params():
    return random_params(network(TINY))


def test_recorded_activations(goldens):
    check_case(goldens, "clip_text_tiny")


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "clip_vit_l14_text", "text", "clip", preset="clip-vit-large-patch14")


def test_round_trip(goldens):
    case = Case(existing(goldens / "clip_text_tiny"))
    check_round_trip(case.weights, "text", "clip", case.config)


def test_a_whole_clip_gives_its_text_half():
    ours = {path: leaf.shape for path, leaf in engine.flatten(network(TINY).abstract).items()}
    names = dict(engine.reference_arrays(ours, lambda path: np.zeros(ours[path], np.float32), table.RULES))
    whole = names | {"vision_model.encoder.layers.0.mlp.fc1.bias": np.zeros(3), "logit_scale": np.zeros(())}
    check_round_trip(whole, "text", "clip", {"text_config": {"num_attention_heads": 2}})
    shapes = {name: array.shape for name, array in whole.items()}
    assert clip.Config(**table.config_from(shapes, {"text_config": {"num_attention_heads": 2}})) == TINY


def test_pooling_at_the_end_of_the_text(params):
    ids = jnp.array([[18, 3, 19, 7, 0], [18, 4, 4, 19, 19]])
    run = lambda cfg: jax.jit(lambda ids: network(cfg)(params, ids))(ids)
    largest, first_seven = run(TINY), run(replace(TINY, eos_token_id=7))
    for out, ends in ((largest, (2, 3)), (first_seven, (3, 0))):  # no such id: position 0, as the reference
        rows = jnp.stack([out.tokens[i, end] for i, end in enumerate(ends)])
        np.testing.assert_allclose(out.pooled, rows, rtol=1e-6)  # rounded in one fusion or another
    np.testing.assert_allclose(largest.projected, largest.pooled @ params["projection"]["kernel"], atol=1e-5)
    assert "projection" not in network(replace(TINY, projection_dim=None)).abstract


def test_a_token_sees_only_what_came_before(params):
    run = jax.jit(lambda ids: network(TINY)(params, ids).tokens)
    ids = jnp.array([[1, 2, 3, 4]])
    changed = run(ids.at[0, 2].set(9))
    np.testing.assert_allclose(changed[:, :2], run(ids)[:, :2], atol=1e-6)
    assert not np.allclose(changed[:, 3], run(ids)[:, 3], atol=1e-3)


def test_an_unknown_activation_is_told():
    with pytest.raises(UserError, match="activation 'gelo' is unknown"):
        network(replace(TINY, hidden_act="gelo"))
