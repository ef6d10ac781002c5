"""I3D: names and sizes; its arithmetic was compared with the reference, which is too large to record."""

import jax
import numpy as np

from opensora_jax.common.shapes import LatentShape
from opensora_jax.models import i3d
from opensora_jax.nn.params import Network
from tests.checks import check_manifest


def test_manifest(goldens):
    check_manifest(goldens, "i3d_inception_400", "models", "i3d", preset="i3d-kinetics-400")


def test_ten_frames_make_one_vector():
    cfg = i3d.Config(num_classes=7)
    net = Network.of(lambda rngs: i3d.build(cfg, rngs=rngs))
    x = i3d.inputs(cfg, LatentShape(2, 10, 224, 224))["x"]
    assert jax.eval_shape(net, net.abstract, x).shape == (2, 7)
    features = jax.eval_shape(lambda params, x: net(params, x, method="features"), net.abstract, x)
    assert features.shape == (2, 1, 1, 1, 1024)


def test_padding_is_that_of_tensorflow():
    x = -np.ones((1, 3, 5, 4, 1), "f4")
    pooled = i3d.max_pool(x, (2, 2, 2), (2, 2, 2))
    np.testing.assert_array_equal(pooled, -np.ones((1, 2, 3, 2, 1)))
