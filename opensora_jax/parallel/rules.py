"""Logical axes and where each rule preset puts them on the mesh.

Parameters and activations carry logical names; a preset maps a name to mesh axes. An axis that does not divide is
replicated, so every model builds on every mesh. Adding a preset is adding a row here.
"""

from collections.abc import Mapping

from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")  # "slice" leads when several pods are joined

# The closed vocabulary. Parameters: how weights are cut. Activations: how a batch of video is cut.
PARAMETER_AXES = ("layers", "embed", "heads", "mlp", "mlp_rows", "vocab", "conv_in", "conv_out")
ACTIVATION_AXES = ("batch", "frames", "space", "tokens")

Rules = Mapping[str, tuple[str, ...]]

_BATCH = {"batch": ("slice", "data", "fsdp")}
_FSDP = {"embed": ("fsdp",), "conv_out": ("fsdp",)}
_TENSOR = {"heads": ("tensor",), "mlp": ("tensor",), "mlp_rows": ("tensor",), "vocab": ("tensor",)}
# Rows of an MLP's second layer are cut before its columns: a 32nd of 4608 rows is whole registers, of 1152 columns it is
# not, and the gathered weights would be copied in each layer (0.1 ms on v6e).
_CUT_OVER_CONTEXT = dict.fromkeys(("embed", "mlp_rows", "conv_out"), ("fsdp", "context"))
_CONTEXT = {"frames": ("context",), "space": ("context",), "tokens": ("context",)}

PRESETS: dict[str, Rules] = {
    "dp": _BATCH,
    "zero": _BATCH,
    "fsdp": _BATCH | _FSDP,
    "fsdp_tp": _BATCH | _FSDP | _TENSOR,
    "fsdp_context": _BATCH | _CONTEXT | _CUT_OVER_CONTEXT,
    "full": _BATCH | _TENSOR | _CONTEXT | _CUT_OVER_CONTEXT | {"mlp_rows": ("tensor", "fsdp", "context")},
}

# What the optimizer keeps (moments, EMA, gradients on their way to it) lies like the parameters, but for these presets.
STATE: dict[str, Rules] = {"zero": PRESETS["fsdp"]}


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, axis_sizes: Mapping[str, int]):
    """The PartitionSpec of an array: mesh axes absent from the mesh, used twice or not dividing are left out."""
    used: set[str] = set()
    entries = []
    for name, size in zip(names, shape):
        chosen: list[str] = []
        for axis in rules.get(name, ()) if name else ():
            width = axis_sizes.get(axis, 1)
            if width > 1 and axis not in used and size % width == 0:
                chosen.append(axis)
                used.add(axis)
                size //= width
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
