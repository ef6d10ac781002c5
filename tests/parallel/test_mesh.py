"""Sizes of mesh axes, and what a mesh that does not fit says."""

import jax
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


def test_pods_are_the_leading_axis():
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=4))
    assert mesh.axis_names[0] == "slice"
    assert [d.id for d in mesh.devices[0].flat] == [0, 1, 2, 3]


def test_a_number_of_pods_that_is_not_here_is_one_sentence():
    class Chip:
        platform, device_kind = "tpu", "TPU v5"

        def __init__(self, pod):
            self.slice_index = pod

    chips = [Chip(i // 2) for i in range(8)]
    with pytest.raises(UserError, match=r"slice=2, but 4 pods are here; set config\.mesh\.slice=4"):
        make_mesh(MeshConfig(slice=2, fsdp=4, data=1), chips)
