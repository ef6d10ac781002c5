"""Logical axes to partition specs."""

import pytest
from jax.sharding import PartitionSpec as P

from opensora_jax.common.errors import UserError
from opensora_jax.parallel import rules, shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh

SIZES = {"data": 2, "fsdp": 4, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("preset", "names", "shape", "expected"),
    [
        ("dp", ("embed", "heads"), (48, 144), P()),
        ("dp", ("batch", None), (16, 5), P(("data", "fsdp"))),
        ("fsdp", ("embed", "heads"), (48, 144), P("fsdp")),
        ("fsdp_tp", ("embed", "heads"), (48, 144), P("fsdp", "tensor")),
        ("fsdp_tp", ("layers", "heads", "embed"), (2, 144, 48), P(None, "tensor", "fsdp")),
        ("fsdp_context", ("embed", "mlp"), (48, 192), P(("fsdp", "context"))),
        ("fsdp_context", ("batch", "frames", "space", None), (8, 4, 16, 48), P(("data", "fsdp"), "context")),
        ("full", ("batch", None, "space", None), (8, 4, 16, 48), P(("data", "fsdp"), None, "context")),
        # what does not divide is replicated, axis by axis
        ("fsdp", ("embed",), (6,), P()),
        ("fsdp_context", ("embed",), (12,), P("fsdp")),
        ("fsdp_context", ("embed",), (6,), P("context")),
        ("dp", ("batch",), (2,), P("data")),
        # a name that the preset leaves alone, no name, a mesh axis that is not there
        ("fsdp", ("vocab", None), (32, 8), P()),
    ],
)
def test_spec(preset, names, shape, expected):
    assert rules.spec(names, shape, rules.PRESETS[preset], SIZES) == expected


def test_axes_missing_from_the_mesh_are_left_out():
    assert rules.spec(("batch", "embed"), (8, 8), rules.PRESETS["fsdp"], {"data": 2}) == P("data")


def test_presets_use_only_the_closed_vocabulary():
    names = {name for preset in rules.PRESETS.values() for name in preset}
    axes = {axis for preset in rules.PRESETS.values() for where in preset.values() for axis in where}
    assert names <= set(rules.PARAMETER_AXES + rules.ACTIVATION_AXES)
    assert axes <= {"slice", *rules.MESH_AXES}


def test_an_unknown_preset_is_one_sentence():
    with pytest.raises(UserError, match="'zero4' is unknown; choose one of dp, zero, fsdp,") as caught:
        shard.layout(make_mesh(MeshConfig()), "zero4")
    assert "\n" not in str(caught.value)
