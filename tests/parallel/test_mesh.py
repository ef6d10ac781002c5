"""Sizes of mesh axes, and what a mesh that does not fit says."""

import jax
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.parallel.mesh import MeshConfig, axis_sizes, make_mesh


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}),
        (MeshConfig(fsdp=4), {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}),
        (MeshConfig(data=1, fsdp=-1, tensor=2), {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}),
        (MeshConfig(slice=2, fsdp=2), {"slice": 2, "data": 2, "fsdp": 2, "context": 1, "tensor": 1}),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(config, expected):
    assert axis_sizes(config, 8) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "only one axis may be -1, but data and fsdp are"),
        (MeshConfig(fsdp=3), "8 devices cannot be divided by 3 .*fsdp=3.*change config.mesh"),
        (MeshConfig(data=2, fsdp=2), "data=2 x fsdp=2 needs 4 devices, but 8 are here"),
        (MeshConfig(fsdp=0), "config.mesh.fsdp=0 must be a positive number, or -1"),
        (MeshConfig(context=-2), "config.mesh.context=-2 must be a positive number, or -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(config, message):
    with pytest.raises(UserError, match=message) as caught:
        axis_sizes(config, 8)
    assert "\n" not in str(caught.value)


def test_every_device_is_used_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor") and mesh.devices.shape == (2, 2, 2, 1)
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}
    assert all("Auto" in str(kind) for kind in mesh.axis_types)


class Chip:
    """Of a torus; machines are boxes of `machine` chips."""

    platform, device_kind, core_on_chip = "tpu", "TPU v6 lite", 0

    def __init__(self, place, sides, machine, pod=0):
        self.coords, self.slice_index = place, pod
        grid = [side // part for side, part in zip(sides, machine)]
        self.process_index = (pod, int(np.ravel_multi_index([c // m for c, m in zip(place, machine)], grid)))


def pod_of(sides, machine, number=0):
    return [Chip(place, sides, machine, number) for place in np.ndindex(*sides)]


MESHES_OF_PODS = [
    ((8, 8, 1), (2, 2, 1), {"data": 2, "fsdp": 4, "context": 8}, (2, 4)),
    ((8, 8, 1), (2, 2, 1), {"data": 8, "fsdp": 8}, ()),
    ((16, 16, 1), (2, 2, 1), {"data": 32, "fsdp": 4, "context": 2}, (2,)),
    ((4, 4, 8), (2, 2, 1), {"data": 2, "fsdp": 4, "context": 8, "tensor": 2}, (2, 2, 2)),
    ((8, 8, 8), (2, 2, 1), {"data": 8, "fsdp": 8, "context": 8}, (2, 2, 2)),
    ((4, 4, 4), (2, 2, 1), {"data": 1, "fsdp": 4, "context": 16}, (2, 2, 4)),
]


@pytest.mark.parametrize(("sides", "machine", "sizes", "box"), MESHES_OF_PODS)
def test_on_a_torus_context_is_compact_and_machines_have_consecutive_rows(sides, machine, sizes, box):
    chips = pod_of(sides, machine)
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), chips)
    assert {id(chip) for chip in mesh.devices.flat} == {id(chip) for chip in chips}
    for group in mesh.devices.transpose(0, 1, 3, 2).reshape(-1, mesh.shape["context"]):
        lengths = [len(set(places)) for places in zip(*(chip.coords for chip in group))]
        assert tuple(sorted(length for length in lengths if length > 1)) == box
    rows = {}
    for row, chips_of_row in enumerate(mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)):
        for chip in chips_of_row:
            rows.setdefault(chip.process_index, set()).add(row)
    assert all(sorted(held) == list(range(min(held), max(held) + 1)) for held in rows.values())


def test_several_pods_of_a_torus():
    chips = pod_of((4, 4, 1), (2, 2, 1), 1) + pod_of((4, 4, 1), (2, 2, 1), 0)
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=2, context=8), chips)
    assert [{chip.slice_index for chip in pod.flat} for pod in mesh.devices] == [{0}, {1}]


def test_pods_are_the_leading_axis():
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=4))
    assert mesh.axis_names[0] == "slice"
    assert [d.id for d in mesh.devices[0].flat] == [0, 1, 2, 3]


def test_a_number_of_pods_that_is_not_here_is_one_sentence():
    chips = [chip for number in range(4) for chip in pod_of((2, 1, 1), (2, 1, 1), number)]
    with pytest.raises(UserError, match=r"slice=2, but 4 pods are here; set config\.mesh\.slice=4"):
        make_mesh(MeshConfig(slice=2, fsdp=4, data=1), chips)
