"""CausalVAE: the recorded case, the manifest, causality, sizes, parts by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.nn.params import Network
from opensora_jax.vaes import causal_vae
from tests.checks import check_case, check_manifest, random_params

TINY = dict(
    hidden_size=32,
    hidden_size_mult=(1, 1),
    num_res_blocks=1,
    encoder_resnet_blocks=("ResnetBlock2D", "ResnetBlock3D"),
    encoder_attention="AttnBlock3DFix",
    encoder_spatial_downsample=("SpatialDownsample2x", ""),
    encoder_temporal_downsample=("TimeDownsampleRes2x", ""),
    decoder_resnet_blocks=("ResnetBlock3D",) * 2,
    decoder_attention="AttnBlock",
    decoder_spatial_upsample=("", "Upsample"),
    decoder_temporal_upsample=("", "TimeUpsample2x"),
)


def test_recorded_case(goldens):
    check_case(goldens, "osp_causal_vae")


def test_manifest(goldens):
    check_manifest(goldens, "osp_causal_vae_4x8x8", "vaes", "causal_vae", preset="CausalVAE-4x8x8-late")


def test_sizes_and_scale_round_trip():
    cfg = causal_vae.Config(**TINY)
    net = Network.of(lambda rngs: causal_vae.build(cfg, rngs=rngs))
    params = random_params(net)
    x = jnp.zeros(causal_vae.inputs(cfg, LatentShape(1, 3, 4, 4))["x"].shape)
    posterior = jax.jit(lambda x: net(params, x, method="posterior"))(x)
    size = causal_vae.latent_size(cfg, *x.shape[1:4])
    assert posterior.mean.shape == (1, *size, 4) == (1, 3, 4, 4, 4)
    z = jax.jit(lambda x: net(params, x, method="encode"))(x)
    np.testing.assert_allclose(z, posterior.mean * 0.18215, atol=1e-5)
    frames = jax.jit(lambda z: (net(params, z, method="decode"), net(params, z, num_frames=2, method="decode")))(z)
    assert [clip.shape for clip in frames] == [x.shape, (1, 2, *x.shape[2:])]


def test_frames_between_are_interpolated():
    x = jnp.array([5.0, 0.0, 4.0])[None, :, None, None, None]
    np.testing.assert_allclose(causal_vae.TimeUp(None)(x).ravel(), [5, 0, 1, 3, 4])
    np.testing.assert_allclose(causal_vae.TimeDown(None)(x).ravel(), [5, 3])
    np.testing.assert_allclose(causal_vae.TimeUp(None)(x[:, :1]).ravel(), [5])


def test_parts_that_do_not_exist_are_named():
    with pytest.raises(UserError, match="ResnetBlock3D"):
        Network.of(lambda rngs: causal_vae.build(causal_vae.Config(encoder_mid_resnet="Resnet"), rngs=rngs))
    with pytest.raises(ValueError, match="decoder_temporal_upsample names 1 parts for 4 levels"):
        causal_vae.Config(decoder_temporal_upsample=("",))
