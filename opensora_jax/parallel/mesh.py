"""The device mesh: `data fsdp context tensor`, led by `slice` when several pods are joined over the data-centre network."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import torus


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slice: int = 1
    rules: str = "fsdp"
    attention: str = ""  # of whole sequences over `context`: heads, gather or ring; empty: chosen by cost


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    sizes = {axis: getattr(config, axis) for axis in ("slice", "data", "fsdp", "context", "tensor")}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis}={size} must be a positive number, or -1 for the devices that are left")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, but {' and '.join(free)} are")
    if free:
        if devices % fixed:
            raise UserError(
                f"mesh: {devices} devices cannot be divided by {fixed} ({_describe(sizes)}); change config.mesh"
            )
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise UserError(f"mesh: {_describe(sizes)} needs {fixed} devices, but {devices} are here; set one axis to -1")
    if sizes["slice"] == 1:
        del sizes["slice"]
    return sizes


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    kinds = (AxisType.Auto,) * len(sizes)
    placed = _joined(sizes, devices) if "slice" in sizes else _placed(sizes, devices)
    return Mesh(placed, tuple(sizes), axis_types=kinds)


def _placed(sizes: dict[str, int], devices) -> np.ndarray:
    found = torus.placed(sizes, devices)
    if found is None:  # GPUs and CPUs as they are numbered; a torus of other sides as JAX lays it out
        shape = tuple(sizes.values())
        found = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return found


def _joined(sizes: dict[str, int], devices) -> np.ndarray:
    """Devices of each pod together, so that only the leading axis crosses the data-centre network."""
    pods: dict[int, list] = {}
    for device in devices:
        pods.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(pods) == 1:  # GPUs and CPUs know no pods: consecutive devices, which are those of consecutive machines
        return np.asarray(devices).reshape(tuple(sizes.values()))
    if len(pods) != sizes["slice"]:
        raise UserError(
            f"mesh: slice={sizes['slice']}, but {len(pods)} pods are here; set config.mesh.slice={len(pods)}"
        )
    inner = {axis: size for axis, size in sizes.items() if axis != "slice"}
    return np.stack([_placed(inner, pods[index]) for index in sorted(pods)])


def _describe(sizes) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"
