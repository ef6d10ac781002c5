"""Adversarial losses against hand-made values, and the weight that balances two gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import adversarial


def test_losses_by_hand():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.5])
    np.testing.assert_allclose(adversarial.hinge(real, fake), 0.5 * (0.25 + 0.75))
    plus = lambda v: np.log1p(np.exp(v))
    expected = 0.5 * ((plus(-2) + plus(-0.5)) / 2 + (plus(-3) + plus(0.5)) / 2)
    np.testing.assert_allclose(adversarial.vanilla(real, fake), expected, rtol=1e-6)
    np.testing.assert_allclose(adversarial.generator(fake), 1.25)


def test_the_weight_balances_gradients_and_is_a_constant():
    weight = lambda g: adversarial.adaptive_weight({"a": jnp.array([3.0, 4.0])}, {"a": g})
    np.testing.assert_allclose(weight(jnp.array([0.0, 0.5])), 5 / 0.5001, rtol=1e-6)
    np.testing.assert_allclose(weight(jnp.zeros(2)), 1e4)
    np.testing.assert_array_equal(jax.grad(lambda g: weight(g))(jnp.ones(2)), 0)


def test_started():
    assert adversarial.started(0.5, jnp.array(9), 10) == 0 and adversarial.started(0.5, jnp.array(10), 10) == 0.5
