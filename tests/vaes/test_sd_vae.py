"""The image VAE: recorded activations, names, options, frames in flight, sampling of the posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.nn.params import Network
from opensora_jax.vaes import sd_vae
from opensora_jax.vaes.posterior import Posterior
from opensora_jax.verify.case import Case
from opensora_jax.weights import sd_vae as table
from tests.checks import check_case, check_manifest, check_round_trip, existing, random_params

TINY = sd_vae.Config(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def recorded(goldens):
    case = Case(existing(goldens / "v10_sdvae_a"))
    weights = {key.removeprefix("module."): array for key, array in case.weights.items()}
    return weights, case.config["autoencoder_kl"]


def make(cfg):
    net = Network.of(lambda rngs: sd_vae.build(cfg, rngs=rngs))
    return net, random_params(net)


def test_recorded_activations(goldens):
    check_case(goldens, "v10_sdvae_a")


def test_full_size_names_and_count(goldens):
    check_manifest(goldens, "sd_vae_ft_mse", "vaes", "sd_vae", preset="sd-vae-ft-mse")


def test_round_trip(recorded):
    check_round_trip(recorded[0], "vaes", "sd_vae", recorded[1])


def test_old_attention_names_fill_the_same_parameters(recorded):
    from opensora_jax.verify.case import load_network

    weights, config = recorded
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = lambda key: next(
        (key.replace(f".{new}.", f".{old}.") for new, old in old_names.items() if new in key), key
    )
    old = {rename(key): array for key, array in weights.items()}
    assert set(old) != set(weights)
    trees = [load_network("vaes", "sd_vae", names, config)[1] for names in (weights, old)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_frames_in_flight_do_not_change_the_result():
    net, params = make(TINY)
    few = Network.of(lambda rngs: sd_vae.build(sd_vae.Config(**vars(TINY) | {"micro_batch_size": 2}), rngs=rngs))
    x = jax.random.normal(jax.random.key(1), (1, 5, 6, 8, 3))

    def both_ways(network):
        def run(params, x):
            z = network(params, x, method="encode")
            return z, network(params, z, method="decode")

        return jax.jit(run)(params, x)

    (z, y), (z_few, y_few) = both_ways(net), both_ways(few)
    assert z.shape == (1, 5, 3, 4, 4) and y.shape == x.shape
    np.testing.assert_allclose(z_few, z, atol=1e-5)
    np.testing.assert_allclose(y_few, y, atol=1e-5)


def test_options_shape_the_network():
    cfg = sd_vae.Config(
        **vars(TINY) | dict(mid_block_attention=False, use_quant_conv=False, use_post_quant_conv=False,
                            latent_channels=3, act_fn="gelu", shift_factor=0.5, scaling_factor=2.0)
    )  # fmt: skip
    net, params = make(cfg)
    assert "quant_conv" not in params and "attention" not in params["encoder"]["mid"]
    image = jnp.ones((1, 1, 4, 4, 3))

    @jax.jit
    def run(params):
        z = net(params, image, method="encode")
        return z, net(params, z, method="decode"), *net(params, image)

    z, decoded, reconstructed, posterior = run(params)
    np.testing.assert_allclose(z, (posterior.mean - 0.5) * 2.0, rtol=1e-6)
    np.testing.assert_allclose(decoded, reconstructed, atol=1e-5)


def test_posterior_is_sampled_only_when_asked():
    posterior = Posterior.of(jnp.concatenate([jnp.full((2, 3, 1), 2.0), jnp.full((2, 3, 1), jnp.log(4.0))], -1))
    np.testing.assert_array_equal(posterior.sample(), posterior.mean)
    np.testing.assert_allclose(posterior.sample(noise=jnp.ones((2, 3, 1))), 4.0)  # mean + one standard deviation
    draws = [posterior.sample(jax.random.key(i)) for i in (0, 0, 1)]
    assert jnp.array_equal(draws[0], draws[1]) and not jnp.array_equal(draws[0], draws[2])
    np.testing.assert_allclose(posterior.kl(), 3 * 0.5 * (4 + 4 - 1 - np.log(4.0)), rtol=1e-6)


def test_a_video_cannot_be_decoded_to_other_lengths():
    net, params = make(TINY)
    with pytest.raises(ValueError, match="3 latents, num_frames 9"):
        net(params, jnp.zeros((1, 3, 2, 2, 4)), num_frames=9, method="decode")


def test_other_kinds_of_blocks_are_refused(recorded):
    shapes = {key: array.shape for key, array in recorded[0].items()}
    with pytest.raises(UserError, match="AttnDownEncoderBlock2D is not served"):
        table.config_from(shapes, {"down_block_types": ["AttnDownEncoderBlock2D"]})
