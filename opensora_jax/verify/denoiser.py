"""What the adapters of denoisers share: one jitted call with its intermediates, and the reference's way of giving text."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.nn import taps
from opensora_jax.sampling.guidance import Guidance


@partial(jax.jit, static_argnums=0)
def forward(net, params, arrays: Mapping):
    """The network's output and everything it tapped."""
    with taps.record() as seen:
        out = net(params, **arrays)
    return out, dict(seen)


def text(given: Mapping, y: str = "y", mask: str = "mask") -> dict:
    """y [B, 1, L, D] → [B, L, D]; a mask of fewer samples is repeated, as for guidance (all conditional, all null)."""
    captions = given[y].reshape(given[y].shape[0], *given[y].shape[-2:])
    if given.get(mask) is None:
        return {"y": captions}
    keep = given[mask].reshape(-1, given[mask].shape[-1])
    return {"y": captions, "text_mask": np.tile(keep, (captions.shape[0] // keep.shape[0], 1))}


def projected_text(given: Mapping) -> dict:
    """Captions that are past their embedder, as networks with skip_y_embedder take them: y [1, all tokens, C] of all
    samples one behind the other, mask [B] the number of each. → [B, L, C] and its mask."""
    lengths = np.asarray(given["mask"]).astype(int)
    keep = np.arange(lengths.max()) < lengths[:, None]
    y = np.zeros((*keep.shape, given["y"].shape[-1]), np.float32)
    y[keep] = given["y"].reshape(-1, y.shape[-1])
    return {"y": y, "text_mask": keep.astype(np.int32)}


def intermediates(case, run: str, seen: Mapping, names: Mapping[str, str]) -> dict:
    """Tapped arrays under the recording's names and in its shapes, where it has them. `names`: tap → recorded name."""
    recorded = {name: case.outputs[full] for name, full in case.recorded(run).items()}
    return {
        f"inter.{name}": seen[tap].reshape(recorded[f"inter.{name}"].shape)
        for tap, name in names.items()
        if tap in seen and f"inter.{name}" in recorded
    }


def guided(net, params, x, named: Mapping, scale: float, *, channels: int):
    """Classifier-free guidance as the image models have it: both halves of the batch [conditional, null] see the first
    half of x, only some channels are guided, and each half keeps its own others."""
    half = jnp.split(jnp.asarray(x), 2)[0]
    out = net(params, jnp.concatenate([half, half]), **named)
    mix = Guidance(scale, channels=channels)(lambda x, t: out, ({}, {}), half, jnp.zeros(len(half)))
    others = jnp.split(out, 2)[1][..., channels:]
    return jnp.concatenate([mix, jnp.concatenate([mix[..., :channels], others], -1)])
