"""Masks of keys as lengths: attention does not mind the order of its keys, so the visible ones move to the front."""

import jax
import jax.numpy as jnp

from opensora_jax.kernels.xla import key_visibility


def visible_first(k_bsnh, v_bsnh, kv_mask, kv_lengths=None):
    """Keys and values with the visible ones first, in their order, and how many they are [B]."""
    visible = key_visibility(k_bsnh.shape[1], kv_lengths, kv_mask)
    order = jnp.argsort(~visible, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    return _reorder(k_bsnh, order, back), _reorder(v_bsnh, order, back), visible.sum(1, dtype=jnp.int32)


@jax.custom_vjp
def _reorder(x_bsnh, order, back):
    """Gathers by `order`; the gradient gathers by its inverse instead of scattering."""
    return jnp.take_along_axis(x_bsnh, order[:, :, None, None], axis=1)


_reorder.defvjp(lambda x, order, back: (_reorder(x, order, back), (order, back)),
                lambda kept, d: (_reorder(d, *reversed(kept)), None, None))  # fmt: skip
