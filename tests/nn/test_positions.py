"""Position tables: constants in float64 against traced float32, layout, scale."""

import jax.numpy as jnp
import numpy as np

from opensora_jax.nn import positions


def test_constant_and_traced_tables_agree():
    constant = positions.grid_sincos((3, 5), 24, scale=0.5, base=4)
    traced = positions.grid_sincos((3, 5), 24, scale=jnp.float32(0.5), base=4)
    assert constant.shape == (3, 5, 24)
    np.testing.assert_allclose(constant, traced, atol=2e-6)


def test_width_comes_first_and_sines_before_cosines():
    table = np.asarray(positions.grid_sincos((2, 3), 8))
    np.testing.assert_allclose(table[1, 2, 0], np.sin(2.0), rtol=1e-6)  # width 2, first frequency
    np.testing.assert_allclose(table[1, 2, 2], np.cos(2.0), rtol=1e-6)
    np.testing.assert_allclose(table[1, 2, 4], np.sin(1.0), rtol=1e-6)  # height 1


def test_resolution_scale_is_the_first_sample_s():
    scale = positions.resolution_scale(jnp.array([256.0, 999.0]), jnp.array([1024.0, 999.0]), 512)
    assert float(scale) == 1.0
