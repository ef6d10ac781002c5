"""The video VAE of Open-Sora 1.3: recorded activations, names, sizes, micro clips with and without a shared frame."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.nn.params import Network
from opensora_jax.vaes import video_vae_v13 as vae13
from opensora_jax.verify.case import Case
from opensora_jax.weights import engine
from opensora_jax.weights import video_vae_v13 as table
from tests.checks import check_case, check_manifest, check_round_trip, existing

TINY = vae13.Config(
    ch=32, z_channels=16, encoder=vae13.Half((32, 32), 1, (0,)), decoder=vae13.Half((32, 32), 1, (1,)),
    temporal_downsample=2, micro_batch_size=3, micro_frame_size=3, normalization=None,
)  # fmt: skip


def network(cfg):
    return Network.of(lambda rngs: vae13.build(cfg, rngs=rngs))


def test_recorded_activations(goldens):
    check_case(goldens, "v13_vae_a")


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "OpenSoraVAE_V1_3", "vaes", "video_vae_v13", preset="OpenSoraVAE_V1_3")


def test_round_trip(goldens):
    case = Case(existing(goldens / "v13_vae_a"))
    check_round_trip(case.weights, "vaes", "video_vae_v13", case.config)


def test_resampling_without_convolutions_is_read_from_the_configuration():
    cfg = replace(vae13.Config(), resamp_with_conv=False)
    ours = {path: leaf.shape for path, leaf in engine.flatten(network(cfg).abstract).items()}
    hollow = lambda path: np.broadcast_to(np.int8(0), ours[path])
    shapes = {name: array.shape for name, array in engine.reference_arrays(ours, hollow, table.RULES)}
    assert not any("downsample" in name for name in shapes)
    config = {"encoder": {"resamp_with_conv": False, "down_sampling_layer": [1, 2]}}
    assert vae13.Config(**table.config_from(shapes, config)) == cfg


def test_sizes():
    released = vae13.PRESETS["OpenSoraVAE_V1_3"]
    assert [vae13.latent_size(released, n, None, None)[0] for n in (1, 49, 65, 97, 113, None)] == [
        1,
        15,
        20,
        30,
        35,
        None,
    ]
    assert vae13.latent_size(released, 113, 720, 1276) == (35, 90, 160)
    assert [vae13.pixel_frames(released, n) for n in (1, 5, 15, 35)] == [1, 17, 49, 113]
    apart, whole = replace(released, temporal_overlap=False), replace(released, micro_frame_size=None)
    assert vae13.latent_size(apart, 51, 8, 8)[0] == 15 and vae13.pixel_frames(apart, 15) == 51
    assert vae13.latent_size(whole, 49, 8, 8)[0] == 13 and vae13.pixel_frames(whole, 13) == 49


tiny_network = functools.cache(lambda: network(TINY))


def stubbed(cfg):
    """The pipeline around networks that mix every frame of what they are given and are easy to follow."""
    net = tiny_network()
    vae = net.module(net.abstract)
    vae.cfg = cfg
    vae.encoder = lambda x: jnp.concatenate([x[:, ::2] + x.sum(1, keepdims=True), x[:, ::2]], -1)
    vae.decoder = lambda z: (jnp.repeat(z, 2, 1) + z.sum(1, keepdims=True))[:, 1:]
    return vae


def test_micro_clips_share_a_frame():
    """Six frames in clips of three that share one: 0-2, 2-4, 4-5; each gives what it gives alone."""
    x = jax.random.normal(jax.random.key(1), (2, 6, 1, 1, 16))
    vae = stubbed(TINY)
    z = vae.encode(x)
    assert z.shape == (2, 5, 1, 1, 16)
    for clip, latents in ((x[:, :3], z[:, :2]), (x[:, 2:5], z[:, 2:4]), (x[:, 4:], z[:, 4:])):
        np.testing.assert_allclose(vae.encode(clip), latents, atol=1e-6)
    np.testing.assert_allclose(stubbed(replace(TINY, micro_batch_size=None)).encode(x[:, :3]), z[:, :2], atol=1e-6)

    y, alone = vae.decode(z), [vae.decode(z[:, i : i + 2]) for i in (0, 2, 4)]
    assert [part.shape[1] for part in alone] == [3, 3, 1] and y.shape[1] == vae13.pixel_frames(TINY, 5) == 5
    np.testing.assert_allclose(y[:, 2], (alone[0][:, 2] + alone[1][:, 0]) / 2, atol=1e-6)
    np.testing.assert_allclose(y[:, 4], (alone[1][:, 2] + alone[2][:, 0]) / 2, atol=1e-6)
    np.testing.assert_allclose(y[:, [0, 1, 3]], jnp.concatenate([alone[0][:, :2], alone[1][:, 1:2]], 1), atol=1e-6)
    assert vae.decode(z, num_frames=4).shape[1] == 4


def test_micro_clips_apart():
    apart = replace(TINY, temporal_overlap=False)
    vae = stubbed(apart)
    x = jnp.ones((1, 7, 1, 1, 16))
    assert [vae.encode(x[:, :n]).shape[1] for n in (1, 3, 6, 7)] == [1, 2, 4, 5]
    assert [vae.decode(x[:, :n]).shape[1] for n in (1, 2, 4, 5)] == [1, 3, 6, 7]
    assert [vae13.pixel_frames(apart, n) for n in (1, 2, 4, 5)] == [1, 3, 6, 7]


def test_reconstruction_samples_only_with_a_key():
    vae = stubbed(replace(TINY, normalization="video"))
    x = jax.random.normal(jax.random.key(1), (1, 3, 1, 1, 16))
    y, posterior = vae(x)
    np.testing.assert_allclose(y, vae.decode(vae.encode(x)), atol=1e-5)
    np.testing.assert_allclose(vae.encode(x, noise=0 * posterior.mean), vae.encode(x), atol=1e-6)
    assert not np.allclose(vae(x, jax.random.key(0))[0], y, atol=1e-3)


@pytest.mark.parametrize("name", ["video", "video_5frames", None])
def test_normalisation_goes_there_and_back(name):
    cfg = replace(TINY, normalization=name)
    z = jax.random.normal(jax.random.key(1), (1, 10, 1, 1, 16))
    normal = vae13.normalise(cfg, z)
    np.testing.assert_allclose(vae13.denormalise(cfg, normal), z, atol=1e-5)
    assert (name is None) == bool(jnp.array_equal(normal, z))
    if name == "video_5frames":  # places repeat with the micro clips; an image takes the first
        np.testing.assert_allclose(vae13.normalise(cfg, z[:, 5:]), normal[:, 5:], atol=1e-6)
        np.testing.assert_allclose(vae13.normalise(cfg, z[:, :1]), normal[:, :1], atol=1e-6)
        with pytest.raises(UserError, match="multiple of 5 latents, not 7"):
            vae13.normalise(cfg, z[:, :7])


def test_an_unknown_normalisation_is_told():
    with pytest.raises(UserError, match="normalization 'image' is unknown"):
        vae13.Config(normalization="image")
