"""Autoencoders over overlapping tiles, cross-faded where they meet: memory of one tile, whatever the size of the clip.

    space = Tiles.of(256, 32, overlap=0.25)                     # an encoder that turns 256 pixels into 32 latents
    if space.cut(height, width): z = over_space(encode, x, space)

A tile is faded with the *finished* tiles above and to its left, as the published systems do it. Tiles of one shape run
one after the other in a single loop, so compilation does not grow with their number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Tiles:
    """One axis. `size`, `stride` and `lead` count positions of the input, `fade` and `keep` those of the output."""

    size: int
    stride: int
    fade: int  # positions that neighbours share
    keep: int  # positions that a tile gives to the result
    lead: int = 0  # causal networks: a tile has so many more, and gives them away (the first keeps them)

    @classmethod
    def of(cls, size: int, outputs: int, *, overlap: float, lead: int = 0) -> "Tiles":
        """Tiles of `size` inputs that become `outputs` outputs; `overlap`: the share of a tile that the next repeats."""
        fade = int(outputs * overlap)
        return cls(size, int(size * (1 - overlap)), fade, outputs - fade, lead)

    def cut(self, *lengths: int) -> bool:
        return any(length > self.size for length in lengths)

    def pieces(self, length: int) -> list[slice]:
        """What the tiles read; a piece that would only give away everything is left out."""
        starts = range(0, length, self.stride)
        return [slice(i, i + self.size + self.lead) for i in starts if i == 0 or length - i > self.lead]


def run(network: Callable, x, *, time: Tiles | None, space: Tiles | None):
    """The network whole, or in tiles of space inside tiles of time, where x [B, T, H, W, C] is larger than one."""

    def in_space(x):
        return over_space(network, x, space) if space and space.cut(*x.shape[2:4]) else network(x)

    return over_time(in_space, x, time) if time and time.cut(x.shape[1]) else in_space(x)


def over_space(network: Callable, x, tiles: Tiles):
    """network: [B, T, h, w, C] → [B, T', h', w', C']; the same cut for both sides of x [B, T, H, W, C]."""
    rows, columns = tiles.pieces(x.shape[2]), tiles.pieces(x.shape[3])
    outputs = iter(each(network, [x[:, :, row, column] for row in rows for column in columns]))
    strips, above = [], None
    for _ in rows:
        done: list[jax.Array] = []
        for j in range(len(columns)):
            tile = next(outputs)
            tile = tile if above is None else fade(above[j], tile, tiles.fade, 2)
            done.append(fade(done[-1], tile, tiles.fade, 3) if done else tile)
        strips.append(jnp.concatenate([tile[:, :, : tiles.keep, : tiles.keep] for tile in done], 3))
        above = done
    return jnp.concatenate(strips, 2)


def over_time(network: Callable, x, tiles: Tiles):
    done, kept = [], []
    for tile in each(network, [x[:, piece] for piece in tiles.pieces(x.shape[1])]):
        tile = fade(done[-1], tile[:, tiles.lead :], tiles.fade, 1) if done else tile
        kept.append(tile[:, : tiles.keep + (0 if done else tiles.lead)])
        done.append(tile)
    return jnp.concatenate(kept, 1)


def fade(before, after, extent: int, axis: int):
    """`after`, whose first positions come out of the last of `before`: at 0 still all `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    part = lambda x, first, last: jax.lax.slice_in_dim(x, first, last, axis=axis)
    share = jnp.arange(extent, dtype=after.dtype).reshape([-1 if i == axis else 1 for i in range(after.ndim)]) / extent
    size = before.shape[axis]
    mixed = part(before, size - extent, size) * (1 - share) + part(after, 0, extent) * share
    return jnp.concatenate([mixed, part(after, extent, after.shape[axis])], axis)


def each(network: Callable, pieces: list) -> list:
    """network(piece) for every piece, those of one shape in one loop."""
    outputs: list = [None] * len(pieces)
    for shape in dict.fromkeys(piece.shape for piece in pieces):
        members = [i for i, piece in enumerate(pieces) if piece.shape == shape]
        if len(members) == 1:
            outputs[members[0]] = network(pieces[members[0]])
            continue
        results = jax.lax.map(network, jnp.stack([pieces[i] for i in members]))
        for i, result in zip(members, results):
            outputs[i] = result
    return outputs
