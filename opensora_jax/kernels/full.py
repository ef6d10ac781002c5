"""Full self-attention of a sequence whose tokens are shared out over the mesh axis `context`; all methods are exact.

    out_btnh = full_attention(q_btnh, k_btnh, v_btnh, visible=padded.visible)

- heads: q, k, v and the result change places by one all-to-all each, so that a device attends over the whole sequence
  with some of the heads (Ulysses, arXiv:2309.14509).
- gather: every device gathers all keys and values.
- ring: blocks of keys and values travel from device to device while the block at hand is attended to
  (arXiv:2310.01889); a device never holds more than two. In the backward pass their gradients travel along.

A device sends 4 V (n-1)/n bytes by heads, 2 V (n-1) by gather and by ring, V being its share of one of q, k, v. So heads
where they divide, else gather, and ring where the gathered keys and values would fill the memory. `config.mesh.attention`
pins one.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.kernels import xla
from opensora_jax.kernels.attention import QUERY_AXES, attention
from opensora_jax.parallel import shard

MOST_GATHERED_BYTES = 1 << 30  # of keys and values together, on one device
WHOLE = ("batch", None, "heads", None)


def shares() -> int:
    """Over how many devices the tokens of a sequence are shared out here."""
    where = shard.current()
    if where is None or shard.manual_axes():
        return 1
    return math.prod(where.sizes[axis] for axis in where.axes_of("tokens"))


def pad_to_shares(x, axis: int):
    """x with zeros behind, so that its tokens divide, and which of them are real ([N] numpy bool)."""
    count = x.shape[axis]
    rest = -count % shares()
    padded = jnp.pad(x, [(0, rest if i == axis else 0) for i in range(x.ndim)]) if rest else x
    return padded, np.arange(count + rest) < count


def full_attention(q_btnh, k_bsnh, v_bsnh, *, visible=None):
    """[B, T, N, H]. visible: [S] numpy bool, False where a key is padding. Keys and values of another number than the
    queries (compressed ones) are taken whole on every device."""
    where, width = shard.current(), shares()
    if visible is not None and visible.all():
        visible = None
    if width == 1:
        return _attend(q_btnh, k_bsnh, v_bsnh, visible=visible)
    lies = lambda names, x: where.sharding(names, x.shape).spec
    spec = lies(QUERY_AXES, q_btnh)
    (axis,) = where.axes_of("tokens")
    if k_bsnh.shape[1] != q_btnh.shape[1]:
        run, of_keys = _attend, lies(WHOLE, k_bsnh)
    else:
        cut_heads = math.prod(where.sizes[name] for name in where.axes_of("heads"))
        method = choose(q_btnh.shape, width, cut_heads, q_btnh.dtype.itemsize, where.attention)
        run, of_keys = functools.partial(METHODS[method], axis=axis), spec
    return jax.shard_map(
        functools.partial(run, visible=visible),
        mesh=where.mesh,
        in_specs=(spec, of_keys, of_keys),
        out_specs=spec,
        check_vma=False,
    )(q_btnh, k_bsnh, v_bsnh)


def choose(shape, width: int, cut_heads: int, itemsize: int, pinned: str) -> str:
    """heads, gather or ring for [B, T, N, H] of all devices; cut_heads: devices that heads are cut over already."""
    batch, tokens, heads, head_dim = shape
    divide = heads % cut_heads == 0 and heads // cut_heads % width == 0
    if pinned == "heads" and not divide:
        raise UserError(
            f"config.mesh.attention=heads: {heads} heads cannot be shared out over {cut_heads * width} devices; "
            "choose gather or ring, or another config.mesh.context"
        )
    if pinned:
        return pinned
    if divide:
        return "heads"
    gathered = 2 * batch * tokens * heads * head_dim * itemsize
    return "gather" if gathered <= MOST_GATHERED_BYTES else "ring"


def _hidden(visible, batch: int) -> dict:
    """How `attention` is told: by a length where padding is at the end, which every back end serves."""
    if visible is None:
        return {}
    count = int(visible.sum())
    if visible[:count].all():
        return {"kv_lengths": jnp.full((batch,), count, jnp.int32)}
    return {"kv_mask": jnp.broadcast_to(visible, (batch, len(visible)))}


def _attend(q, k, v, *, visible):
    return attention(q, k, v, **_hidden(visible, q.shape[0]))


def _by_heads(q, k, v, *, visible, axis):
    give, take = (
        functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=split, concat_axis=concat, tiled=True)
        for split, concat in ((2, 1), (1, 2))
    )
    return take(_attend(give(q), give(k), give(v), visible=visible))


def _by_gather(q, k, v, *, visible, axis):
    whole = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
    return _attend(q, whole(k), whole(v), visible=visible)


def _by_ring(q, k, v, *, visible, axis):
    ring = Ring(axis, jax.lax.axis_size(axis), visible, q.shape[-1] ** -0.5)
    attend = jax.custom_vjp(lambda q, k, v: ring.forward(q, k, v)[0])
    attend.defvjp(ring.forward, ring.backward)
    return attend(q, k, v)


METHODS = {"heads": _by_heads, "gather": _by_gather, "ring": _by_ring}


class Ring:
    """Softmax with a running maximum over the blocks that pass by; scores of at most xla.MAX_SCORE_BYTES at once."""

    def __init__(self, axis: str, width: int, visible, scale: float):
        self.axis, self.width, self.visible, self.scale = axis, width, visible, scale

    def forward(self, q, k, v):
        pieces = self._pieces(q, k)
        rows = (
            q,
            jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32),
            jnp.full(q.shape[:3], xla.HIDDEN, jnp.float32),
            jnp.zeros(q.shape[:3], jnp.float32),
        )

        def hop(carry, i):
            block, rows = carry
            following = self._pass_on(block)  # under way while this block is attended to
            return (following, self._merge(rows, block, i)), None

        (block, rows), _ = jax.lax.scan(hop, ((k, v), _split(rows, pieces)), jnp.arange(self.width - 1))
        _, out, peak, total = _join(self._merge(rows, block, self.width - 1))
        out = (out / total[..., None]).astype(q.dtype)
        return out, (q, k, v, out, peak + jnp.log(total))

    def backward(self, kept, d_out):
        q, k, v, out, lse = kept
        delta = jnp.einsum("btnh,btnh->btn", d_out, out, preferred_element_type=jnp.float32)
        rows = _split((q, d_out, lse, delta), self._pieces(q, k))
        zeros = lambda x: jnp.zeros(x.shape, jnp.float32)

        def hop(carry, i):
            block, gradients, d_q = carry
            following = self._pass_on(block)
            gradients, more = self._gradients(rows, block, gradients, i)
            return (following, self._pass_on(gradients), d_q + more), None

        carry = ((k, v), (zeros(k), zeros(v)), zeros(rows[0]))
        (block, gradients, d_q), _ = jax.lax.scan(hop, carry, jnp.arange(self.width - 1))
        gradients, more = self._gradients(rows, block, gradients, self.width - 1)
        d_k, d_v = self._pass_on(gradients)  # home again
        return _join((d_q + more,))[0].astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    def _pass_on(self, tree):
        return jax.lax.ppermute(tree, self.axis, [(i, (i + 1) % self.width) for i in range(self.width)])

    def _scores(self, q, k, i):
        """Logits [B, T, N, S] of the block that is here at hop i, and which of its keys count."""
        logits = jnp.einsum("btnh,bsnh->btns", q, k, preferred_element_type=jnp.float32) * self.scale
        if self.visible is None:
            return logits, True
        origin = (jax.lax.axis_index(self.axis) - i) % self.width
        seen = jax.lax.dynamic_slice(jnp.asarray(self.visible), (origin * k.shape[1],), (k.shape[1],))
        return jnp.where(seen, logits, xla.HIDDEN), seen

    def _merge(self, rows, block, i):
        k, v = block

        def piece(row):
            q, out, peak, total = row
            logits, seen = self._scores(q, k, i)
            higher = jnp.maximum(peak, logits.max(-1))
            weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
            fade = jnp.exp(peak - higher)
            more = jnp.einsum("btns,bsnh->btnh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return q, out * fade[..., None] + more, higher, total * fade + weights.sum(-1)

        return jax.lax.map(piece, rows)

    def _gradients(self, rows, block, gradients, i):
        k, v = block

        def piece(total, row):
            q, d_out, lse, delta = row
            logits, seen = self._scores(q, k, i)
            weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_weights = product("btnh,bsnh->btns", d_out, v)
            d_logits = (weights * (d_weights - delta[..., None]) * self.scale).astype(q.dtype)
            d_k = total[0] + product("btns,btnh->bsnh", d_logits, q)
            d_v = total[1] + product("btns,btnh->bsnh", weights.astype(d_out.dtype), d_out)
            return (d_k, d_v), product("btns,bsnh->btnh", d_logits, k)

        return jax.lax.scan(piece, gradients, rows)

    def _pieces(self, q, k) -> int:
        """The fewest equal runs of queries whose scores fit."""
        batch, queries, heads, _ = q.shape
        least = -(-4 * batch * heads * queries * k.shape[1] // xla.MAX_SCORE_BYTES)
        return next(pieces for pieces in range(least, queries + 1) if queries % pieces == 0)


def _split(rows, pieces: int):
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), 1, 0)
    return jax.tree.map(cut, rows)


def _join(rows):
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return jax.tree.map(whole, rows)
