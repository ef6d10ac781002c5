"""Drop path and the choice of modulation by frame."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.nn import modulate


def test_drop_path_rates_rise_and_keep_the_mean():
    factors = np.asarray(modulate.drop_path(jax.random.key(0), 0.5, (3, 2, 4000)))
    assert (factors[0] == 1).all()
    np.testing.assert_allclose(factors.mean((1, 2)), 1, atol=0.05)
    np.testing.assert_allclose((factors == 0).mean((1, 2)), [0, 0.25, 0.5], atol=0.03)


def test_drop_path_is_off_without_a_key_or_a_rate():
    assert modulate.drop_path(None, 0.5, (3, 2, 4)) is None
    assert modulate.drop_path(jax.random.key(0), 0.0, (3, 2, 4)) is None


def test_gated_drops_whole_samples():
    h = jnp.ones((2, 3, 4, 5))
    out = modulate.gated(h, 2.0 * jnp.ones((2, 1, 1, 5)), jnp.array([0.0, 1.25]))
    assert (out[0] == 0).all() and (out[1] == 2.5).all()


def test_by_frame_takes_the_condition_where_the_mask_is_false():
    a, b = jnp.ones((1, 4)), jnp.zeros((1, 4))
    np.testing.assert_array_equal(modulate.by_frame(a, b, jnp.array([[True, False]]))[0, :, 0], [1, 0])
    assert modulate.by_frame(a, b, None).shape == (1, 1, 4)
