"""Latte of Open-Sora-Plan: recorded cases, manifests, and what joint image training and conditioning must keep apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.shapes import LatentShape
from opensora_jax.models import latte_t2v
from opensora_jax.nn.params import Network
from tests.checks import check_case, check_manifest, random_params

SIZE = dict(sample_size=(4, 4), video_length=3, hidden_size=16, depth=2, num_heads=2)


@pytest.mark.parametrize("case", ["osp_latte_t2v", "osp_latte_uncond"])
def test_recorded_cases(goldens, case):
    check_case(goldens, case)


@pytest.mark.parametrize(
    "manifest, preset", [("osp_latte_t2v_xl_122", "LatteT2V-XL/122"), ("osp_latte_xl_122", "Latte-XL/122")]
)
def test_manifests(goldens, manifest, preset):
    check_manifest(goldens, manifest, "models", "latte_t2v", preset=preset)


@pytest.fixture(scope="module")
def text_model():
    cfg = latte_t2v.Config(**SIZE, caption_channels=6, caption_tokens=3, activation="geglu", norm_affine=True)
    net = Network.of(lambda rngs: latte_t2v.build(cfg, rngs=rngs))
    return net, random_params(net)


def test_stills_and_video_do_not_see_each_other(text_model):
    net, params = text_model
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1, 5, 4, 4, 4)), rng.normal(size=(1, 3, 4, 6))
    run = jax.jit(lambda x, y: net(params, x, jnp.array([7.0]), y, jnp.ones((1, 3, 4)), images=2))
    base = run(x, y)
    other = run(x + (np.arange(5) == 4)[:, None, None, None], y + (np.arange(3) == 2)[:, None, None])
    np.testing.assert_array_equal(base[:, :4], other[:, :4])
    assert np.abs(base[:, 4] - other[:, 4]).max() > 1e-3
    alone = net(params, x[:, :3], jnp.array([7.0]), y[:, 0], jnp.ones((1, 4)))
    np.testing.assert_allclose(base[:, :3], alone, atol=1e-5)


def test_a_dropped_caption_is_the_null_caption_and_a_hidden_one_is_seen(text_model):
    net, params = text_model
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 4, 4, 4)), rng.normal(size=(2, 5, 6))
    run = jax.jit(lambda y, mask, drop: net(params, x, jnp.zeros(2), y, mask, drop_text=drop))
    keep, mask = jnp.zeros(2, bool), jnp.ones((2, 5))
    null = params["y_embedder"]["null"][jnp.arange(5) % 3]
    np.testing.assert_allclose(
        run(y, mask, jnp.array([True, False])), run(jnp.stack([null, y[1]]), mask, keep), atol=1e-6
    )
    np.testing.assert_allclose(run(y, 0 * mask, keep), run(y, mask, keep), atol=1e-6)
    assert np.abs(run(y, mask.at[:, 2:].set(0), keep) - run(y, mask, keep)).max() > 1e-3


def test_labels_condition_and_the_last_row_is_no_class():
    cfg = latte_t2v.Config(**SIZE, caption_channels=0, num_classes=3)
    net = Network.of(lambda rngs: latte_t2v.build(cfg, rngs=rngs))
    params = random_params(net)
    arrays = latte_t2v.inputs(cfg, LatentShape(2, 3, 4, 6))
    given = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in arrays.items()}
    run = jax.jit(lambda labels, drop: net(params, **(given | {"labels": labels}), drop_label=drop))
    keep = jnp.zeros(2, bool)
    one = run(jnp.array([1, 1]), keep)
    assert one.shape == (2, 3, 4, 6, 8)
    assert np.abs(one - run(jnp.array([2, 2]), keep)).max() > 1e-5
    np.testing.assert_array_equal(run(jnp.array([1, 2]), ~keep), run(jnp.array([3, 3]), keep))


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="gelu-approximate"):
        latte_t2v.Config(activation="relu")
    with pytest.raises(ValueError, match="caption_channels"):
        latte_t2v.Config(caption_channels=0, only_cross_attention=True)
