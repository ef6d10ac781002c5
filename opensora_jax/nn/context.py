"""Networks over video [B, T, S, C] cut along the `context` axis: one function of a share of the frames.

Left to sharding propagation, the change between frames cut and positions cut moves many times the bytes it needs
(docs/sharding.md). So the network runs inside one `shard_map`: each device holds some frames, a layer changes to some
positions and back with one all-to-all each, weights are gathered layer by layer in the compute dtype, and their
gradients return as reduce-scatters. Between the exchanges the stream stays in their pieces (parallel/pieces.py), so that
they copy nothing. Lengths that do not divide are padded and lie in one piece; attention never sees the padding, because
both exchanges cut it off.

    sequence = Sequence.of(x, cfg.patch_size)
    tokens = sequence.run(Net.share, self, (x, x_mask), given)     # calls share(net, sequence, x, x_mask, **given)
    h = sequence.cut(tokens)                                       # inside share; the identity without a context axis,
    h = sequence.by_position(h)                                    # as the exchanges are
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from opensora_jax.nn.embeddings import pad_to_patch, patch_3d
from opensora_jax.parallel import pieces, shard

TENSOR_AXES = ("heads", "mlp", "vocab")  # cuts within a layer, which stay with the compiler


@dataclass(frozen=True)
class Sequence:
    """The tokens of a video: their grid, and the mesh axes that share them out."""

    frames: int
    rows: int
    columns: int
    patch: tuple[int, int, int] = (1, 1, 1)
    axes: tuple[str, ...] = ()
    ways: int = 1

    @classmethod
    def of(cls, x, patch) -> "Sequence":
        """Of latents [B, T, H, W, C] under the current layout."""
        patch = patch_3d(patch)
        grid = (-(-size // p) for size, p in zip(x.shape[1:4], patch))
        where = shard.current()
        axes = () if where is None or shard.manual_axes() else where.axes_of("frames")
        ways = math.prod(where.sizes[axis] for axis in axes) if axes else 1
        return cls(*grid, patch, axes, ways)

    @property
    def pieces(self) -> int:
        """Into how many the stream is cut: 1 where lengths do not divide, or nothing is shared out."""
        divides = self.frames % self.ways == 0 and self.rows * self.columns % self.ways == 0
        return self.ways if divides else 1

    def cut(self, x):
        """Some frames, all positions [B, T, S, C] → [pieces * B, T, S / pieces, C]."""
        return pieces.cut(x, self.pieces, 2)

    def join(self, x):
        """The reverse of `cut`."""
        return pieces.join(x, self.pieces, 2)

    def of_some(self, a):
        """What a sample [B, 1, ...] or each frame [B, T, ...] has, for the stream cut over frames [pieces * B, T, ...]."""
        return a if self.pieces == 1 else jnp.tile(a, (self.pieces, *[1] * (a.ndim - 1)))

    def of_all(self, a):
        """The same for the stream cut over positions, where a piece holds some of all frames."""
        return self.of_some(a) if a.shape[1] == 1 else pieces.cut(a, self.pieces, 1)

    def of_layers(self, keep):
        """Drop-path factors [depth, branches, B], or None."""
        return keep if keep is None or self.pieces == 1 else jnp.tile(keep, (1, 1, self.pieces))

    def by_position(self, x):
        """Some frames, all positions → all frames, some positions; pieces of positions → pieces of frames."""
        if self.ways == 1:
            return x
        if self.pieces > 1:
            return self._exchanged(x)
        x = _padded(x, 2, self.ways)
        x = jax.lax.all_to_all(x, self.axes, split_axis=2, concat_axis=1, tiled=True)
        return checkpoint_name(x[:, : self.frames], "switched")

    def by_frame(self, x):
        """The way back."""
        if self.ways == 1:
            return x
        if self.pieces > 1:
            return self._exchanged(x)
        x = _padded(x, 1, self.ways)
        x = jax.lax.all_to_all(x, self.axes, split_axis=1, concat_axis=2, tiled=True)
        return checkpoint_name(x[:, :, : self.rows * self.columns], "switched")

    def _exchanged(self, x):
        x = jax.lax.all_to_all(x, self.axes, split_axis=0, concat_axis=0, tiled=True)
        return checkpoint_name(x, "switched")

    def run(self, share: Callable, module: nnx.Module, framed: tuple, given: dict, names: dict | None = None):
        """share(module, self, *framed, **given), on every device for its samples and frames → [B, frames, S, ...],
        where frames may be padded.

        framed: latents [B, T, H, W, C] and arrays [B, T', ...] of frames of tokens, or None. given: arrays [B, ...] or
        None; names: logical axes of those that are not.
        """
        if self.ways == 1:
            return share(module, self, *framed, **given)
        x, *others = framed
        frames = -(-self.frames // self.ways) * self.ways
        x = _to_length(pad_to_patch(x, self.patch), frames * self.patch[0])
        framed = (x, *(None if a is None else _to_length(a, frames) for a in others))
        where = shard.current()
        tensor = {axis for name in TENSOR_AXES for axis in where.axes_of(name)}
        spec = lambda axes, a: where.spec(axes, a.shape, without=tensor)
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
        variables, tree = jax.tree.flatten(module, is_leaf=is_variable)
        axes = [variable.get_metadata().get("out_sharding") or () for variable in variables]
        values = [variable[...] for variable in variables]
        cuts = list(map(spec, axes, values))
        dtype = jnp.dtype(module.cfg.dtype)

        def on_device(values, framed, given):
            shares = [
                _marked(variable, value, cut, dtype) if any(cut) else variable.replace(value)
                for variable, value, cut in zip(variables, values, cuts)
            ]
            whole = [s if axis[:1] == ("layers",) else gathered(s) for s, axis in zip(shares, axes)]
            return share(jax.tree.unflatten(tree, whole), self, *framed, **given)

        named = {name: (names or {}).get(name, ("batch",)) for name in given}
        present = {name: a for name, a in given.items() if a is not None}
        absent = dict.fromkeys(given.keys() - present.keys())
        inputs = (cuts, tuple(None if a is None else spec(("batch", "frames"), a) for a in framed))
        return jax.shard_map(
            lambda values, framed, present: on_device(values, framed, present | absent),
            mesh=where.mesh,
            in_specs=(*inputs, {name: spec(named[name], a) for name, a in present.items()}),
            out_specs=where.spec(("batch", "frames"), (x.shape[0], frames), without=tensor),
            axis_names=set(where.sizes) - tensor,
            check_vma=False,
        )(values, framed, present)


@dataclass(frozen=True)
class Share:
    """What a device's part of a parameter needs to become whole: mesh axes of each dimension, and the dtype to travel in."""

    axes: tuple[tuple[str, ...], ...]
    dtype: Any


def gathered(module):
    """A layer (or one parameter) with whole weights. Backward scatters the gradients' sums the same way."""
    return jax.tree.map(_gathered, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def in_shares(module) -> bool:
    leaves = jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return any(_share_of(leaf) is not None for leaf in leaves)


def _share_of(leaf) -> Share | None:
    return leaf.get_metadata().get("share") if isinstance(leaf, nnx.Variable) else None


def _marked(variable, value, cut, dtype):
    variable = variable.replace(value)
    entries = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in cut]
    entries += [()] * (value.ndim - len(entries))
    variable.set_metadata(share=Share(tuple(entries), dtype))
    return variable


def _gathered(leaf):
    share = _share_of(leaf)
    if share is None:
        return leaf
    value = leaf[...]
    if share.dtype.itemsize < value.dtype.itemsize:
        value = value.astype(share.dtype)
    for dimension, axes in enumerate(share.axes[len(share.axes) - value.ndim :]):  # a layer has lost its leading axis
        if axes:
            shape = list(value.shape)
            shape[dimension] *= jax.lax.axis_size(axes)
            # Shares stacked, not joined: where they are no whole registers, a reduce-scatter of joined rows is compiled to an
            # all-reduce, which waits (libtpu 0.0.51).
            value = jax.lax.all_gather(value, axes, axis=dimension).reshape(shape)
            # So that the gradient is a product of whole rows, cut afterwards: in shares it takes twice as long.
            value = jax.lax.optimization_barrier(value)
    return leaf.replace(value)


def _padded(x, axis: int, multiple: int):
    return _to_length(x, -(-x.shape[axis] // multiple) * multiple, axis)


def _to_length(x, length: int, axis: int = 1):
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pads) if length > x.shape[axis] else x
