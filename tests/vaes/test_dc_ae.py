"""DC-AE: recorded activations, names, shortcuts by hand, and what its options do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.config import Part
from opensora_jax.nn.params import Network
from opensora_jax.system import System
from opensora_jax.training.run import VaeLossConfig
from opensora_jax.vaes import dc_ae
from opensora_jax.verify.case import Case
from opensora_jax.weights import dc_ae as table
from opensora_jax.weights import engine
from tests.checks import check_case, check_manifest, check_round_trip, existing, ours, random_params


@pytest.mark.parametrize("case", ["dcae_video_basic", "dcae_video_tiling"])
def test_recorded_activations(goldens, case):
    check_case(goldens, case)


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "dc_ae_f32t4c128", "vaes", "dc_ae", preset="dc-ae-f32t4c128")


def test_round_trip(goldens):
    case = Case(existing(goldens / "dcae_video_basic"))
    check_round_trip(case.weights, "vaes", "dc_ae", case.config["effective"])


def test_a_checkpoint_without_config_is_read_as_released(goldens):
    case = Case(existing(goldens / "dcae_video_basic"))
    shapes = {key: array.shape for key, array in case.weights.items()}
    told = table.config_from(shapes, case.config["effective"])
    assert dc_ae.Config(**table.config_from(shapes, {}), time_compression_ratio=4) == dc_ae.Config(**told)


def test_pixels_and_channels():
    """Rows of 2 x 2 pixels become 4 channels each, the old channel slowest; the way back is exact."""
    x = np.arange(32.0).reshape(1, 1, 4, 4, 2)
    moved = dc_ae.pixels_to_channels(x, (1, 2, 2))
    np.testing.assert_array_equal(moved[0, 0, 0, 0], [0, 2, 8, 10, 1, 3, 9, 11])
    np.testing.assert_array_equal(dc_ae.channels_to_pixels(moved, (1, 2, 2)), x)
    clip = np.random.default_rng(0).normal(size=(1, 4, 2, 6, 3))
    np.testing.assert_array_equal(dc_ae.channels_to_pixels(dc_ae.pixels_to_channels(clip, (2, 2, 2)), (2, 2, 2)), clip)
    np.testing.assert_allclose(
        dc_ae.average(x, outputs=2, factors=(2, 2, 2))[0, 0, 0, 0], [5, 6]
    )  # one frame stays one
    assert dc_ae.duplicate(moved, outputs=2, factors=(2, 2, 2)).shape == x.shape
    with pytest.raises(UserError, match=r"\[3, 2, 6\] positions do not split by \[2, 2, 2\]"):
        dc_ae.average(clip[:, :3], outputs=3, factors=(2, 2, 2))


IMAGE = dc_ae.Half(
    width_list=(8, 8, 32),
    depth_list=(0, 1, 2),
    block_type=("ResBlock", "ResBlock", ("ResBlock", "EViT_GLU")),
    norm="rms2d",
    pixel_shuffle=True,
    shortcut=False,
    latent_shortcut=False,
    match_channel=True,
    temporal=(),
)
IMAGE_CONFIG = dc_ae.Config(
    encoder=IMAGE,
    decoder=dataclasses.replace(IMAGE, out_norm="ln2d", out_act="relu"),
    latent_channels=4,
    is_video=False,
    time_compression_ratio=1,
    spatial_compression_ratio=4,
    double_latent=True,
    scaling_factor=0.5,
)


def test_image_networks_with_every_other_option():
    """Frames are independent; names lead back to the same Config."""
    net = Network.of(lambda rngs: dc_ae.build(IMAGE_CONFIG, rngs=rngs))
    params = random_params(net)
    x = jax.random.normal(jax.random.key(0), dc_ae.inputs(IMAGE_CONFIG, LatentShape(1, 2, 3, 2))["x"].shape)
    encode = jax.jit(lambda x: net(params, x[:, :1], method="encode"))
    z = encode(x)
    assert z.shape == (1, 1, 3, 2, 8)
    np.testing.assert_array_equal(encode(x.at[:, 1].set(0)), z)
    shape = jax.eval_shape(lambda z: net(params, z, method="decode"), jnp.zeros((1, 2, 3, 2, 4))).shape
    assert shape == (1, 2, 12, 8, 3)
    leaves = engine.flatten(params)
    back = {key: array.shape for key, array in engine.reference_arrays(ours(net), leaves.__getitem__, table.RULES)}
    both = {"width_list": [8, 8, 32], "norm": "rms2d"}
    encoder = both | {"downsample_block_type": "ConvPixelUnshuffle", "downsample_shortcut": None, "out_shortcut": None}
    decoder = both | {"upsample_block_type": "ConvPixelShuffle", "upsample_shortcut": None, "in_shortcut": None}
    config = {"encoder": encoder | {"double_latent": True, "temporal_downsample": []}, "scaling_factor": 0.5}
    config["decoder"] = decoder | {"out_norm": "ln2d", "temporal_upsample": []}
    assert dc_ae.Config(**table.config_from(back, config)) == IMAGE_CONFIG


def test_training_without_a_posterior():
    """There is nothing to sample, so the loss has no KL term."""
    system = System(vae=Part("vaes", "dc_ae", dataclasses.replace(IMAGE_CONFIG, double_latent=False)))
    params = system.networks["vae"].abstract
    loss_fn = system.reconstruction_loss(VaeLossConfig(l2_weight=1.0))
    batch, key = (
        {"video": jax.ShapeDtypeStruct((2, 1, 16, 16, 3), "float32")},
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    (loss, terms), gradients = jax.eval_shape(jax.value_and_grad(loss_fn, has_aux=True), params, batch, key, {})
    assert loss.shape == () and terms.keys() == {"l1", "l2"}
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def test_mistakes_are_told():
    build = lambda **changes: Network.of(
        lambda rngs: dc_ae.build(dataclasses.replace(IMAGE_CONFIG, **changes), rngs=rngs)
    )
    with pytest.raises(UserError, match="is for image networks"):
        build(is_video=True)
    with pytest.raises(UserError, match="block_type 'ViT' is unknown"):
        build(encoder=dataclasses.replace(IMAGE, block_type=("ViT",) * 3))
