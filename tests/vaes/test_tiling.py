"""Tiles: what is read, what is kept, and how neighbours are faded, on networks simple enough to follow by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.vaes.tiling import Tiles, each, fade, over_space, over_time


def test_a_position_wise_network_does_not_notice_tiles():
    """Where neighbours agree, cross-fading them is the identity, whatever the remainders."""
    network = lambda x: jnp.repeat(x, 2, 1)[:, :, ::2, ::2] * 3
    x = jax.random.normal(jax.random.key(0), (1, 11, 22, 14, 2))
    in_space = jax.jit(lambda x: over_space(network, x, Tiles.of(8, 4, overlap=0.25)))(x)
    in_time = jax.jit(lambda x: over_time(network, x, Tiles.of(4, 8, overlap=0.5)))(x)
    np.testing.assert_allclose(in_space, network(x), atol=1e-6)
    np.testing.assert_allclose(in_time, network(x), atol=1e-6)


def test_causal_tiles_give_away_their_first_frame():
    """4k + 1 frames become k + 1: every tile starts with a frame of its own that only the first may keep."""
    network = lambda x: jnp.concatenate([x[:, :1], x[:, 1:].reshape(1, -1, 4, *x.shape[2:]).mean(2)], 1)
    x = jax.random.normal(jax.random.key(0), (1, 29, 1, 1, 2))
    tiles = Tiles.of(16, 4, overlap=0.25, lead=1)
    assert tiles.pieces(29) == [slice(0, 17), slice(12, 29), slice(24, 41)]
    assert tiles.pieces(25) == [slice(0, 17), slice(12, 29)]  # a third would hold nothing but the frame to give away
    for clip in (x, x[:, :25]):
        out = jax.jit(lambda clip: over_time(network, clip, tiles))(clip)
        np.testing.assert_allclose(out, network(clip), atol=1e-6)


def test_fading_is_linear_and_starts_with_the_tile_before():
    mixed = fade(jnp.ones((1, 6)), jnp.zeros((1, 5)), 4, 1)
    np.testing.assert_allclose(mixed, [[1, 0.75, 0.5, 0.25, 0]])
    np.testing.assert_allclose(fade(jnp.ones((1, 6)), jnp.zeros((1, 2)), 4, 1), [[1, 0.5]])
    assert fade(jnp.ones((1, 6)), jnp.zeros((1, 0)), 4, 1).shape == (1, 0)


def test_a_corner_is_faded_with_finished_neighbours():
    """Every tile becomes a constant: 1 2 / 3 4. The last first meets its neighbour above, which has already met the
    first, then the one to its left."""
    x = np.zeros((1, 1, 4, 4, 1), np.float32)
    x[0, 0, ::2, ::2, 0] = [[1, 2], [3, 4]]
    network = lambda tile: jnp.broadcast_to(tile[:, :, :1, :1], tile.shape)
    out = jax.jit(lambda x: over_space(network, x, Tiles.of(4, 4, overlap=0.5)))(x)
    expected = [[1, 1, 1, 1.5], [1, 1, 1, 1.5], [1, 1, 1, 1.25], [2, 2, 2, 2.375]]
    np.testing.assert_allclose(out[0, 0, :, :, 0], expected)


def test_a_tile_sees_only_itself():
    x = jnp.arange(12.0).reshape(1, 1, 1, 12, 1)
    centred = lambda tile: tile - tile.mean((2, 3), keepdims=True)
    out = jax.jit(lambda x: over_space(centred, x, Tiles.of(4, 4, overlap=0)))(x)
    np.testing.assert_allclose(out.ravel(), np.tile([-1.5, -0.5, 0.5, 1.5], 3))


def test_tiles_of_one_shape_share_a_loop():
    calls = []

    def network(x):
        calls.append(x.shape)
        return x + 1

    pieces = [jnp.full((1, n), float(i)) for i, n in enumerate((3, 3, 2, 3))]
    for piece, out in zip(pieces, each(network, pieces)):
        np.testing.assert_array_equal(out, piece + 1)
    assert calls == [(1, 3), (1, 2)]
