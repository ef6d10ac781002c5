"""Autoencoders on images larger than memory: overlapping tiles in space, blended where they meet.

    moments = tiled(encoder, x, tile=256, stride=192, blend=8, keep=24)

A tile is blended with the finished tile above, then with the finished one to its left, as diffusers does it; the result
depends on that order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def tiled(network: Callable, x, *, tile: int, stride: int, blend: int, keep: int):
    """x [B, T, H, W, C] through `network` in tiles of `tile` every `stride`; of each output the first `keep` rows and
    columns stay, of which the first `blend` fade in from the neighbour."""
    tops, lefts = range(0, x.shape[2], stride), range(0, x.shape[3], stride)
    tiles = {(top, left): x[:, :, top : top + tile, left : left + tile] for top in tops for left in lefts}
    outs = one_by_one(network, tiles)
    for top in tops:
        for left in lefts:
            if top:
                outs[top, left] = fade(outs[top - stride, left], outs[top, left], blend, axis=2)
            if left:
                outs[top, left] = fade(outs[top, left - stride], outs[top, left], blend, axis=3)
    kept = lambda top: [outs[top, left][:, :, :keep, :keep] for left in lefts]
    return jnp.concatenate([jnp.concatenate(kept(top), 3) for top in tops], 2)


def one_by_one(network: Callable, tiles: dict) -> dict:
    """Every tile through the network, one in memory at a time, one compiled network a shape."""
    outs = {}
    for shape in {tile.shape: None for tile in tiles.values()}:
        places = [place for place, tile in tiles.items() if tile.shape == shape]
        results = jax.lax.map(network, jnp.stack([tiles[place] for place in places]))
        outs |= dict(zip(places, results))
    return outs


def fade(before, after, extent: int, axis: int):
    """`after`, whose first `extent` entries along the axis fade in from the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    part = lambda a, start, stop: a[(slice(None),) * axis + (slice(start, stop),)]
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=jnp.float32) / extent).reshape(shape)
    seam = part(before, before.shape[axis] - extent, None) * (1 - weight) + part(after, 0, extent) * weight
    return jnp.concatenate([seam.astype(after.dtype), part(after, extent, None)], axis)
