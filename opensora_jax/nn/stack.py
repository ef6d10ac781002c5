"""The only place that stacks layers: one scan, named remat policies.

    self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), depth, rngs=rngs)      # leaves [depth, ...]
    x = run_stack(lambda x, block: block(x, t), x, self.blocks, remat="full")

Several stacks that alternate are scanned together: `run_stack(body, x, (self.spatial, self.temporal))`.
Keys for dropout are scanned along as one more entry of the tuple: `jax.random.split(key, depth)`.
"""

from collections.abc import Callable

import jax
from flax import nnx

from opensora_jax.nn import taps
from opensora_jax.nn.context import gathered, in_shares
from opensora_jax.parallel import shard

# Tensors that blocks mark with jax.ad_checkpoint.checkpoint_name. What spatial attention gave out has a name of its own.
REMAT_NAMES = ("spatial_out", "attention_out", "switched")

_policies = jax.checkpoint_policies
REMAT = {
    "none": None,  # keep everything
    "full": _policies.nothing_saveable,  # keep layer inputs only
    "dots": _policies.save_from_both_policies(  # keep results of products and attention; the rest is elementwise
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("product", *REMAT_NAMES)
    ),
    "spatial": _policies.save_only_these_names("spatial_out"),  # "full", but no spatial attention is repeated
    "switches": _policies.save_only_these_names("switched"),  # "full", but no all-to-all of nn/context.py is repeated
    "names": _policies.save_only_these_names(*REMAT_NAMES),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(REMAT_NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module with a leading layer axis on every leaf."""
    return nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})(rngs.split(depth))


def run_stack(body: Callable, x, layers, *, remat: str = "none", first: int = 0):
    """x = body(x, layer) over the leading axis of `layers`. While activations are recorded the loop is unrolled and
    each layer's taps are named `<index>/<name>`, counted from `first` where a network has several runs of layers."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is unknown; choose one of {', '.join(REMAT)}")
    if remat == "offload":
        shard.need_host_memory("model.remat=offload")
    depth = jax.tree.leaves(layers)[0].shape[0]
    if taps.recording():
        for i in range(depth):
            with taps.scope(f"{first + i}/"):
                x = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
        return x
    step = lambda carry, layer: (body(carry, gathered(layer)), None)
    policy = REMAT[remat]
    if policy is None and in_shares(layers):  # keep activations, but not every layer's whole weights
        gathering = (jax.lax.all_gather_p, jax.lax.reshape_p, jax.lax.optimization_barrier_p)
        policy = lambda primitive, *_, **__: primitive not in gathering
    if policy is not None:
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(step, x, layers)[0]
