"""Fused STDiT attention for short rows on NVIDIA GPUs (Pallas, Triton lowering): mostly the temporal rows of T <= 128.

One program takes one head of several neighbouring positions over all their T frames, straight from the projected
[B, T, S, 3, N, H] activations: 64 / T rows share one tile of scores with a block-diagonal mask and a single-pass
softmax. The q/k norm, the rotation and their gradients happen on the tile, so every activation crosses memory once.
Rows of S tokens (spatial mode, small frames) go the same way. Rotation tables count as constants: they get no gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from opensora_jax.kernels import blocks as block_table
from opensora_jax.kernels import spec
from opensora_jax.kernels.pallas_gpu import LOG2E, dot, dots, interpreted, pieces
from opensora_jax.kernels.spec import Call, Unsupported
from opensora_jax.kernels.xla import HIDDEN

MAX_ROW = 128


class Layout(NamedTuple):
    """The static part: `row` tokens attend to each other, `packed` neighbouring rows share a tile."""

    temporal: bool
    row: int
    rows: int  # neighbouring rows, packed along this axis
    padded: int  # row rounded up to a power of two
    packed: int
    heads: int
    head_dim: int
    norm_before_rope: bool
    warps: int
    interpret: bool


def supports(call: Call) -> None:
    if call.dtype not in ("bfloat16", "float16", "float32"):
        raise Unsupported(f"dtype {call.dtype}")
    if call.queries > MAX_ROW:
        raise Unsupported(f"rows of {call.queries} tokens are longer than {MAX_ROW}: one tile holds a row")
    if call.head_dim % 2 or call.head_dim > 128:
        raise Unsupported(f"head_dim {call.head_dim}")


def takes_pieces(call: Call, pieces: int) -> bool:
    return False


def stdit_attention(
    qkv_btsc, *, num_heads, mode, q_scale, k_scale, rope, norm_before_rope, kv_mask=None, name=None, blocks=None
):
    """`blocks` (rows of one score tile, unless a row alone is longer; warps) instead of the table's."""
    b, t, s, c3 = qkv_btsc.shape
    temporal = mode == "temporal"
    row, rows = (t, s) if temporal else (s, t)
    tile_rows, warps = blocks or block_table.find("stdit_gpu", "rows", c3 // 3 // num_heads, row)
    padded = max(pl.next_power_of_2(row), 1)
    packed = max(1, max(tile_rows, 16) // padded)
    warps = warps if padded * packed <= 64 else 2 * warps
    head_dim = c3 // 3 // num_heads
    layout = Layout(temporal, row, rows, padded, packed, num_heads, head_dim, norm_before_rope, warps, interpreted())
    extras = {}
    if q_scale is not None:
        extras["norm"] = jnp.stack([q_scale, k_scale]).astype(jnp.float32)
    if rope is not None:
        extras["rope"] = jnp.stack([table.astype(jnp.float32) for table in rope])
    if kv_mask is not None:
        extras["visible"] = kv_mask.astype(jnp.int32)
    out = _fused(qkv_btsc.reshape(b, t, s, 3, num_heads, head_dim), extras, layout).reshape(b, t, s, c3 // 3)
    return spec.named(out, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused(qkv, extras, layout):
    b, t, s, _, heads, head_dim = qkv.shape
    out_shape = jax.ShapeDtypeStruct((b, t, s, heads, head_dim), qkv.dtype)
    return _call(_forward_kernel, "stdit_rows", layout, out_shape, b, qkv, extras)


def _fused_forward(qkv, extras, layout):
    return _fused(qkv, extras, layout), (qkv, extras)


def _fused_backward(layout, residuals, d_out):
    qkv, extras = residuals
    out_shape = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    if "norm" in extras:
        grid = _grid(layout, qkv.shape[0])
        out_shape.append(jax.ShapeDtypeStruct((*grid, 2, layout.head_dim), jnp.float32))
    d_qkv, *d_norm = _call(_backward_kernel, "stdit_rows_backward", layout, out_shape, qkv.shape[0], qkv, extras, d_out)
    d_extras = dict.fromkeys(extras)
    if d_norm:
        d_extras["norm"] = d_norm[0].sum((0, 1, 2))
    if "rope" in extras:
        d_extras["rope"] = jnp.zeros_like(extras["rope"])
    return d_qkv, d_extras


_fused.defvjp(_fused_forward, _fused_backward)


def _grid(layout, batch):
    return (layout.heads, -(-layout.rows // layout.packed), batch)


def _call(kernel, name, layout, out_shape, batch, *operands):
    return pl.pallas_call(
        functools.partial(kernel, layout=layout),
        grid=_grid(layout, batch),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=layout.warps, num_stages=1),
        interpret=layout.interpret,
        name=name,
    )(*operands)


class _Tile:
    """The tokens of one program: tile row r is token r // packed of row first + r % packed."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.head, index, self.batch = (pl.program_id(i) for i in range(3))
        r = jnp.arange(layout.padded * layout.packed)
        self.token = jax.lax.div(r, layout.packed)
        self.lane = jax.lax.rem(r, layout.packed)
        self.row = index * layout.packed + self.lane
        self.inside = (self.token < layout.row) & (self.row < layout.rows)

    def _at(self, piece, *which):
        start, width = piece
        shape = (self.token.size, width)
        token, row = (jnp.broadcast_to(x[:, None], shape) for x in (self.token, self.row))
        column = jnp.broadcast_to((start + jnp.arange(width))[None, :], shape)
        mask = self.inside[:, None] & (column < self.layout.head_dim)
        frame, position = (token, row) if self.layout.temporal else (row, token)
        return (self.batch, frame, position, *which, self.head, column), mask

    def load(self, ref, *which):
        out = []
        for piece in pieces(self.layout.head_dim):
            at, mask = self._at(piece, *which)
            out.append(plgpu.load(ref.at[at], mask=mask, other=0))
        return out

    def store(self, ref, tile, *which):
        for piece, x in zip(pieces(self.layout.head_dim), tile):
            at, mask = self._at(piece, *which)
            plgpu.store(ref.at[at], x.astype(ref.dtype), mask=mask)

    def tables(self, ref):
        """Cosine and sine pieces [tile, width] of a [2, row, head_dim] table."""
        out = []
        for which in range(2):
            for start, width in pieces(self.layout.head_dim):
                shape = (self.token.size, width)
                token = jnp.broadcast_to(self.token[:, None], shape)
                column = jnp.broadcast_to((start + jnp.arange(width))[None, :], shape)
                mask = (token < self.layout.row) & (column < self.layout.head_dim)
                out.append(plgpu.load(ref.at[which, token, column], mask=mask, other=0))
        return out[: len(out) // 2], out[len(out) // 2 :]

    def visible(self, extras):
        mask = (self.lane[:, None] == self.lane[None, :]) & (self.token < self.layout.row)[None, :]
        if "visible" in extras:
            shown = plgpu.load(extras["visible"].at[self.batch, self.token], mask=self.token < self.layout.row, other=0)
            mask = mask & (shown > 0)[None, :]
        return mask


def _vector(ref, which, head_dim):
    """Pieces [1, width] of row `which` of a [2, head_dim] array."""
    out = []
    for start, width in pieces(head_dim):
        column = start + jnp.arange(width)
        mask = column < head_dim if start + width > head_dim else None
        x = plgpu.load(ref.at[which, column], mask=mask, other=None if mask is None else 0)
        out.append(x[None, :])
    return out


def _prepare(tile, norm, rope, layout):
    """Norm and rotation of raw pieces, float32."""
    x = [piece.astype(jnp.float32) for piece in tile]
    if norm is not None and layout.norm_before_rope:
        x = [piece * weight for piece, weight in zip(_normalise(x, layout)[0], norm)]
    if rope is not None:
        x = [piece * c + _turn(piece) * s for piece, c, s in zip(x, *rope)]
    if norm is not None and not layout.norm_before_rope:
        x = [piece * weight for piece, weight in zip(_normalise(x, layout)[0], norm)]
    return x


def _prepare_backward(tile, norm, rope, layout, d):
    """Gradients of the raw pieces and of the norm's weight (or None)."""
    x = [piece.astype(jnp.float32) for piece in tile]
    turn_back = lambda d: d if rope is None else [g * c - _turn(g * s) for g, c, s in zip(d, *rope)]
    if norm is None:
        return turn_back(d), None
    if layout.norm_before_rope:
        return _normalise_backward(x, norm, layout, turn_back(d))
    if rope is not None:
        x = [piece * c + _turn(piece) * s for piece, c, s in zip(x, *rope)]
    d_rotated, d_norm = _normalise_backward(x, norm, layout, d)
    return turn_back(d_rotated), d_norm


def _normalise(x, layout):
    mean = sum(jnp.square(piece).sum(-1) for piece in x)[:, None] / layout.head_dim
    scale = jax.lax.rsqrt(mean + 1e-6)
    return [piece * scale for piece in x], scale


def _normalise_backward(x, weights, layout, d):
    x, scale = _normalise(x, layout)
    d_weights = [(g * piece).sum(0) for g, piece in zip(d, x)]
    d = [g * weight for g, weight in zip(d, weights)]
    along = sum((g * piece).sum(-1) for g, piece in zip(d, x))[:, None] / layout.head_dim
    return [scale * (g - piece * along) for g, piece in zip(d, x)], d_weights


def _turn(x):
    """(x0, x1) → (-x1, x0) of each pair of columns."""
    rows, width = x.shape
    even, odd = jnp.split(x.reshape(rows, width // 2, 2), 2, axis=-1)
    return jnp.concatenate([-odd, even], axis=-1).reshape(rows, width)


def _weights(q, k, mask, head_dim):
    scores = jnp.where(mask, dots(q, k) * (head_dim**-0.5 * LOG2E), HIDDEN)
    weights = jnp.where(mask, jnp.exp2(scores - scores.max(-1)[:, None]), 0.0)
    total = weights.sum(-1)
    return weights / jnp.where(total > 0, total, 1.0)[:, None]


def _inputs(tile, qkv_ref, extras, layout):
    """Raw q, k, v; the norms of q and k; the rotation."""
    raw = [tile.load(qkv_ref, which) for which in range(3)]
    norms = [_vector(extras["norm"], i, layout.head_dim) for i in range(2)] if "norm" in extras else [None, None]
    rope = tile.tables(extras["rope"]) if "rope" in extras else None
    return raw, norms, rope


def _forward_kernel(qkv_ref, extras, o_ref, *, layout):
    tile = _Tile(layout)
    (q, k, v), norms, rope = _inputs(tile, qkv_ref, extras, layout)
    q, k = ([x.astype(qkv_ref.dtype) for x in _prepare(raw, norm, rope, layout)] for raw, norm in zip((q, k), norms))
    weights = _weights(q, k, tile.visible(extras), layout.head_dim).astype(qkv_ref.dtype)
    tile.store(o_ref, [dot(weights, piece) for piece in v])


def _backward_kernel(qkv_ref, extras, do_ref, d_qkv_ref, *d_norm_ref, layout):
    tile = _Tile(layout)
    (q_raw, k_raw, v), norms, rope = _inputs(tile, qkv_ref, extras, layout)
    dtype = qkv_ref.dtype
    do = tile.load(do_ref)
    q, k = ([x.astype(dtype) for x in _prepare(raw, norm, rope, layout)] for raw, norm in zip((q_raw, k_raw), norms))
    weights = _weights(q, k, tile.visible(extras), layout.head_dim)
    d_weights = dots(do, v)
    delta = (weights * d_weights).sum(-1)
    ds = (weights * (d_weights - delta[:, None]) * layout.head_dim**-0.5).astype(dtype)
    tile.store(d_qkv_ref, [dot(weights.astype(dtype).T, piece) for piece in do], 2)
    d_prepared = [dot(ds, piece) for piece in k], [dot(ds.T, piece) for piece in q]
    for which, (raw, norm, d_tile) in enumerate(zip((q_raw, k_raw), norms, d_prepared)):
        d_raw, d_norm = _prepare_backward(raw, norm, rope, layout, d_tile)
        tile.store(d_qkv_ref, d_raw, which)
        if d_norm is not None:
            _store_vector(d_norm_ref[0], which, d_norm)


def _store_vector(ref, which, vector):
    """This program's share of the gradient of one norm weight."""
    place = [pl.program_id(i) for i in range(3)]
    head_dim = ref.shape[-1]
    for (start, width), x in zip(pieces(head_dim), vector):
        column = start + jnp.arange(width)
        mask = column < head_dim if start + width > head_dim else None
        plgpu.store(ref.at[(*place, which, column)], x.reshape(width), mask=mask)
