"""What an attention call asks for, in static terms: back ends accept it or say why not; logs, tables and tests name it.

`target("v6e")` makes the choice for another machine than this one, for ahead-of-time compilation (`plan`, benchmarks).
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Kernels with work for one step of a row alone, the innermost dimension of their grid: keys and values that the first
# prepares, positions beyond the last one that the last clears.
ONCE_A_ROW = ("stdit_spatial", "cross_attention", "cross_backward", "stdit_temporal", "stdit_temporal_backward")
CHIPS = {  # device_kind, in lower case, contains → our name
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5p": "v5p",
    "v5": "v5p",
    "v6 lite": "v6e",
    "v6e": "v6e",
    "v4": "v4",
    "tpu7x": "v7x",
    "tpu": "tpu",
    "h100": "hopper",
    "h200": "hopper",
    "h800": "hopper",
    "gh200": "hopper",
}
_target: ContextVar[str | None] = ContextVar("attention_target", default=None)


class Unsupported(Exception):
    """A back end cannot serve this call; the message says why."""


@dataclass(frozen=True)
class Call:
    """One problem. `kind` is "attention", "spatial" or "temporal"; extras are the names of optional inputs."""

    kind: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: str
    extras: frozenset[str] = frozenset()

    def __str__(self):
        extras = "".join(f"+{name}" for name in sorted(self.extras))
        sizes = f"{self.batch}x{self.queries}x{self.keys} h{self.heads} d{self.head_dim}"
        return f"{self.kind} {sizes} {self.dtype}{extras}"

    def through_attention(self) -> "Call":
        """The plain problem that remains of a fused call after XLA's split, norm and rotation."""
        return replace(self, kind="attention", extras=self.extras & {"kv_mask"})

    def refuse(self, *names: str) -> None:
        """Raises when the call uses one of these optional inputs."""
        present = sorted(self.extras.intersection(names))
        if present:
            raise Unsupported(f"{' and '.join(present)} not served")


def kept(x, name: str | None):
    """A tensor that policies of jax.checkpoint may keep under a name. They keep its bits: jax 0.10 rounds kept floating-point
    tensors to the precision that they have, which behind a kernel is a pass of its own. Bits have no gradients: this is
    for rules of kernels, `named` for all else."""
    if name is None:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)


named = jax.custom_jvp(kept, nondiff_argnums=(1,))


@named.defjvp
def _named_jvp(name, primals, tangents):
    return kept(*primals, name), *tangents


def repeat(arrays, batch: int):
    """Arrays [B, ...] (some may be None) over and over again, up to `batch` samples."""
    again = lambda a: a if a.shape[0] == batch else jnp.tile(a, (batch // a.shape[0], *[1] * (a.ndim - 1)))
    return jax.tree.map(again, arrays)


@contextmanager
def target(chip: str):
    """Choose back ends for `chip` ("v5e", "v6e", "hopper", "cuda", "cpu", ...) while tracing inside this block."""
    token = _target.set(chip)
    try:
        yield
    finally:
        _target.reset(token)


def chip() -> str:
    """The machine that this trace is for: `target`, else the mesh in context, else the default device."""
    if _target.get():
        return _target.get()
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = getattr(device, "device_kind", None) or jax.devices()[0].device_kind
    named = next((name for text, name in CHIPS.items() if text in kind.lower()), None)
    return named or {"gpu": "cuda", "cuda": "cuda"}.get(jax.default_backend(), jax.default_backend())


def platform() -> str:
    """ "tpu", "cuda" or what jax calls it ("cpu")."""
    name = chip()
    if name in ("hopper", "cuda", "ampere", "blackwell"):
        return "cuda"
    return "tpu" if name.startswith("v") or name == "tpu" else name
