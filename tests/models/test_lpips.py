"""LPIPS: the recorded case, both backbones' names, what a distance must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.models import lpips
from opensora_jax.nn.params import Network
from opensora_jax.weights import lpips as weights
from tests.checks import check_case, check_round_trip, random_params


def test_recorded_case(goldens):
    check_case(goldens, "osp_lpips_recipe")


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_torchvision_and_channel_weights_make_a_whole(net):
    width, tensors = 3, {"classifier.1.weight": np.zeros((1, 1), "f4"), "scaling_layer.shift": np.zeros((1, 3, 1, 1))}
    for k, convs in enumerate(lpips.NETWORKS[net].slices):
        for index, outputs, kernel, *_ in convs:
            tensors[f"features.{index}.weight"] = np.full((outputs, width, kernel, kernel), index, "f4")
            tensors[f"features.{index}.bias"] = np.full(outputs, -index, "f4")
            width = outputs
        tensors[f"lin{k}.model.1.weight"] = np.full((1, width, 1, 1), k, "f4")
    whole = weights.joined(tensors)
    assert weights.joined(whole) == whole
    assert weights.recognise({name: tensor.shape for name, tensor in whole.items()}, {})
    check_round_trip(whole, "models", "lpips", {})


@pytest.fixture(scope="module")
def distance():
    net = Network.of(lambda rngs: lpips.build(lpips.Config("alex"), rngs=rngs))
    params = random_params(net)
    params["lin"] = jax.tree.map(jnp.abs, params["lin"])
    return jax.jit(lambda x, y, spatial: net(params, x, y, spatial=spatial), static_argnums=2)


def test_a_distance_is_zero_symmetric_and_grows(distance):
    rng = np.random.default_rng(1)
    x, noise = jnp.asarray(rng.uniform(-1, 1, (2, 64, 48, 3)), "float32"), rng.normal(size=(2, 64, 48, 3))
    near, far = (jnp.asarray(x + amount * noise, "float32") for amount in (0.05, 0.8))
    np.testing.assert_allclose(distance(x, x, False), 0, atol=1e-7)
    np.testing.assert_allclose(distance(x, far, False), distance(far, x, False), rtol=1e-5)
    assert (distance(x, far, False) > distance(x, near, False)).all()
    spatial = distance(x, far, True)
    assert spatial.shape == (2, 64, 48)
    np.testing.assert_allclose(spatial.mean((1, 2)), distance(x, far, False), rtol=0.3)


def test_equal_images_have_a_gradient(distance):
    x = jnp.zeros((1, 64, 64, 3))
    assert np.isfinite(jax.grad(lambda y: distance(x, y, False).sum())(x)).all()


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="vgg, alex"):
        lpips.Config("squeeze")
