"""Tiles: seams by hand, and no trace of them where the network is local."""

import jax.numpy as jnp
import numpy as np

from opensora_jax.vaes.tiling import fade, tiled


def test_a_seam_fades_linearly():
    before, after = jnp.full((1, 1, 4, 1, 1), 8.0), jnp.zeros((1, 1, 6, 1, 1))
    np.testing.assert_allclose(fade(before, after, 4, axis=2).ravel(), [8, 6, 4, 2, 0, 0])
    np.testing.assert_allclose(fade(before, after[:, :, :2], 4, axis=2).ravel(), [8, 4])
    assert fade(before, after, 0, axis=2) is after


def test_tiles_of_a_local_network_leave_no_seams():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 22, 13, 1)), jnp.float32)
    upscale = lambda tile: 2 * jnp.repeat(jnp.repeat(tile, 2, 2), 2, 3)
    out = tiled(upscale, x, tile=8, stride=6, blend=4, keep=12)
    np.testing.assert_allclose(out, upscale(x), rtol=1e-5)


def test_a_tile_sees_only_itself():
    x = jnp.arange(12.0).reshape(1, 1, 1, 12, 1)
    out = tiled(lambda tile: tile - tile.mean((2, 3), keepdims=True), x, tile=4, stride=4, blend=0, keep=4)
    np.testing.assert_allclose(out.ravel(), np.tile([-1.5, -0.5, 0.5, 1.5], 3))
