"""What the backward pass finds kept of a layer, and what it computes again: named policies, and the tensors they name."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NAMES = ("spatial_out", "attention_out", "switched")

_policies = jax.checkpoint_policies
REMAT = {
    "none": None,  # keep everything
    "full": _policies.nothing_saveable,  # keep layer inputs only
    "dots": _policies.save_from_both_policies(  # keep results of products and attention; the rest is elementwise
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("product", *NAMES)
    ),
    "spatial": _policies.save_only_these_names("spatial_out"),  # "full", but no spatial attention is repeated
    "switches": _policies.save_only_these_names("switched"),  # "full", but no all-to-all of nn/context.py is repeated
    "names": _policies.save_only_these_names(*NAMES),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def named(x, name: str):
    """A tensor that policies may keep. They keep its bits: jax 0.10 rounds kept floating-point tensors to the precision that
    they have, which behind a kernel is a pass of its own."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)


@named.defjvp
def _named_jvp(name, primals, tangents):
    return named(*primals, name), *tangents
