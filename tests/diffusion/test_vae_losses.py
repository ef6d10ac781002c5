"""VAE losses against their definitions in float64, and the adversary's weight against hand-taken gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import adversarial, vae_losses
from opensora_jax.diffusion.vae_losses import Config


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, 3, 4, 4, 3)), jnp.float32) for _ in range(2)]


def test_reconstruction_sums_pixels_and_divides_by_frames(clips):
    cfg = Config(perceptual_weight=0.5, log_variance=0.3)
    perceptual = lambda a, b: jnp.square(a - b).mean((1, 2, 3))
    terms = vae_losses.reconstruction(*clips, cfg, perceptual=perceptual, weights=jnp.full((3,), 2.0))
    x, y = (np.asarray(c, np.float64) for c in clips)
    error = np.abs(x - y) + 0.5 * ((x - y) ** 2).mean((2, 3, 4), keepdims=True)
    nll = (error / np.exp(0.3) + 0.3).sum() / 6
    np.testing.assert_allclose(terms["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(terms["weighted_nll"], 2 * nll, rtol=1e-5)
    np.testing.assert_allclose(terms["recon"], np.abs(x - y).sum() / 6, rtol=1e-5)
    np.testing.assert_allclose(terms["perceptual"], ((x - y) ** 2).sum() / 6, rtol=1e-5)
    plain = vae_losses.reconstruction(*clips, cfg)
    assert plain["nll"] == plain["weighted_nll"] and "perceptual" not in plain
    assert vae_losses.divergence(jnp.array([2.0, 4.0]), Config(kl_weight=0.1)) == pytest.approx(0.3)


def test_the_adversary_weighs_as_much_as_the_reconstruction():
    kernel, scale = jnp.array([3.0, 4.0]), jnp.float32(2.0)
    cfg = Config(adversary_factor=0.8, adversary_weight=0.5, generator_start_step=10)

    def total(scale, step):
        nll_of = lambda k: scale * (k**2).sum()
        logits_of = lambda k: scale * k
        return vae_losses.adversary(nll_of, logits_of, kernel, step, cfg)

    loss, terms = total(scale, 10)
    weight = 0.5 * (2 * 2 * 5.0) / (np.sqrt(2.0) + 1e-4)  # |∇nll| = 2·scale·|k|; each logit's gradient is scale / 2
    np.testing.assert_allclose(terms["d_weight"], weight, rtol=1e-5)
    np.testing.assert_allclose(loss, weight * 0.8 * -7.0, rtol=1e-5)
    assert total(scale, 9)[0] == 0
    grad = jax.grad(lambda s: total(s, 10)[0])(scale)
    np.testing.assert_allclose(grad, weight * 0.8 * -3.5, rtol=1e-5)  # through the logits, not through the weight


def test_discriminator_losses():
    real, fake = jnp.array([0.5, 2.0]), jnp.array([-0.5, 1.0])
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x)))
    entropy = 0.5 * (-np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean())
    expected = {
        "hinge": 0.5 * (0.25 + 1.25),
        "vanilla": entropy,
        "non-saturating": entropy,
        "wgan-gp": 0.5 * (0.25 - 1.25),
    }
    for kind, value in expected.items():
        cfg = Config(adversary_factor=2.0, discriminator_loss=kind, discriminator_start_step=5)
        assert vae_losses.discriminator(real, fake, 4, cfg)[0] == 0
        np.testing.assert_allclose(vae_losses.discriminator(real, fake, 5, cfg)[0], 2 * value, rtol=1e-5)
    np.testing.assert_allclose(adversarial.non_saturating(fake), -np.log(sigmoid(fake)).mean(), rtol=1e-5)


def test_lecam_and_penalty_join_the_discriminator(clips):
    real, fake = jnp.array([0.5, 2.0]), jnp.array([-0.5, 1.0])
    cfg = Config(adversary_factor=0.0, lecam_weight=0.1, gradient_penalty_weight=10.0)
    loss, terms = vae_losses.discriminator(real, fake, 0, cfg, means=(0.75, 0.25), penalty=0.2)
    np.testing.assert_allclose(terms["lecam"], 0.1 * ((1.25 - 0.25) ** 2 + (0.75 - 0.25) ** 2), rtol=1e-5)
    np.testing.assert_allclose(loss, terms["lecam"] + 2.0, rtol=1e-5)
    np.testing.assert_allclose(vae_losses.running_means((1.0, 0.0), real, fake, 0.9), (1.025, 0.025), rtol=1e-5)
    x = clips[0]
    penalty = adversarial.gradient_penalty(lambda x: 0.5 * (x**2).sum((1, 2, 3, 4)), x)
    norms = np.sqrt((np.asarray(x, np.float64) ** 2).sum((1, 2, 3, 4)))
    np.testing.assert_allclose(penalty, ((norms - 1) ** 2).mean(), rtol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="non-saturating"):
        replace(vae_losses.V1_2, generator_loss="vanilla")
