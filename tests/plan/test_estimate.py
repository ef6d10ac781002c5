"""Arithmetic of a plan: topologies, links, memory against the chip's, time, what it tells the user to change."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.plan import chips, estimate, report
from opensora_jax.plan.hlo import Collective
from opensora_jax.plan.links import Links, Side, Span
from opensora_jax.work import Kernel

V5P = chips.parse("v5p:4x4x4")
SIZES = {"data": 4, "fsdp": 2, "context": 8}


def torus(topology, sizes):
    """Devices in the order of their coordinates, as a mesh would hold them."""
    grid = np.stack(np.meshgrid(*map(np.arange, topology.sides), indexing="ij"), -1).reshape(-1, len(topology.sides))
    return Links.of(topology, sizes, [SimpleNamespace(coords=tuple(place)) for place in grid])


def plan(**changes):
    exchange = Collective("all-to-all", ("context",), 8, "bf16", 18.9e6, 168)
    gather = Collective("all-gather", ("fsdp",), 2, "bf16", 8e6, 56, asynchronous=True)
    base = estimate.Plan(
        topology=V5P, source="compiler", mesh=SIZES, rules="fsdp_context", remat="full", bucket="512x512",
        batch=8, tokens=8 * 65536, parameters=759_000_000, trainable=758_000_000,
        memory=estimate.Memory(0.45e9, 1.35e9), model_flops=2.3e15, hardware_flops=3.1e15,
        fusion_seconds=0.2, fusions_from="cycles", kernel_seconds=0.05, kernels_from="roofline",
        collectives=(exchange, gather), collective_seconds=(0.03, 0.01),
    )  # fmt: skip
    return replace(base, **changes)


def test_topologies():
    assert (V5P.chips, V5P.devices, V5P.name) == (64, 64, "v5p:4x4x4")
    assert chips.parse("tpu7x:2x2x1").devices == 8  # two cores a chip
    assert chips.parse("v5litepod:4x4").chip.name == "v5e"
    assert chips.parse("h100:8x16").devices == 128
    assert chips.parse("a100:8").sides == (8, 1)


@pytest.mark.parametrize("text", ["v5p", "v5p:4x4", "v6e:2x2x2", "x9:4x4", "v6e:0x4", "h100:2x2x2", "v6e:8x"])
def test_a_wrong_topology_is_one_sentence(text):
    with pytest.raises(UserError, match="--topology="):
        chips.parse(text)


def test_a_side_of_the_whole_torus_is_a_ring():
    links = torus(V5P, {"data": 4, "fsdp": 4, "context": 4})
    assert links.span(("context",)) == Span((Side(4, True),))
    assert links.span(("data", "context")) == Span((Side(4, True), Side(4, True)))
    half = torus(chips.parse("v6e:8x8"), {"data": 8, "context": 8})
    assert half.span(("context",)) == Span((Side(8, False),))  # v6e closes at 16


def test_groups_in_each_others_gaps_share_the_links():
    """`data` skips every other chip of a side of the torus: its ring stays closed at half the speed."""
    sides = torus(V5P, {"data": 2, "fsdp": 2, "context": 16})
    apart, beside = sides.span(("data",)), sides.span(("fsdp",))
    assert apart == Span((Side(2, True, 2.0),)) and beside == Span((Side(2, False, 1.0),))
    exchange = Collective("all-to-all", ("data",), 2, "bf16", 8e6)
    assert sides.seconds(exchange) == pytest.approx(8e6 * 2 / (4 * 90e9))


def test_seconds_follow_the_ring_formulas():
    links = torus(V5P, {"data": 4, "fsdp": 4, "context": 4})
    exchange = Collective("all-to-all", ("context",), 4, "bf16", 8e6, count=10)
    assert links.seconds(exchange) == pytest.approx(10 * 8e6 * 4 / (8 * 90e9))
    gather = Collective("all-gather", ("context",), 4, "bf16", 8e6)
    assert links.seconds(gather) == pytest.approx(8e6 * 0.75 / 180e9)
    both = replace(gather, kind="all-reduce", axes=("fsdp", "context"), size=16)
    assert links.seconds(both) == pytest.approx(2 * 8e6 * 15 / 16 / 360e9)  # two rings at once
    assert links.seconds(replace(both, rings=2)) == pytest.approx(2 * 8e6 * 15 / 16 / 180e9)  # on the sparse cores
    assert links.seconds(replace(gather, kind="collective-permute")) == pytest.approx(8e6 / 90e9)


def test_gpus_speak_over_nvlink_inside_a_machine_and_over_the_network_between_machines():
    links = Links.of(chips.parse("h100:8x4"), {"data": 4, "fsdp": 8})
    inside = Collective("all-gather", ("fsdp",), 8, "bf16", 8e8)
    assert links.span(("fsdp",)) == Span(machines=1, local=8)
    assert links.seconds(inside) == pytest.approx(8e8 * 7 / 8 / 450e9)
    between = Collective("all-reduce", ("data",), 4, "f32", 8e8)
    assert links.span(("data",)) == Span(machines=4, local=1)
    assert links.seconds(between) == pytest.approx(2 * 8e8 * 3 / 4 / 50e9)


def test_memory_against_the_chip():
    assert plan().fits and plan().advice() == []
    full = 95e9 * (1 - estimate.RESERVE)
    assert plan(memory=estimate.Memory(full - 10, 10)).fits
    assert not plan(memory=estimate.Memory(full, 10)).fits


def test_advice_names_what_to_change():
    activations = plan(memory=estimate.Memory(10e9, 100e9), remat="none", batch=64).advice()
    assert activations[0] == "does not fit by 18.80 GB"
    assert any("remat=full" in line for line in activations) and any("accumulate_steps" in line for line in activations)
    state = plan(memory=estimate.Memory(100e9, 10e9)).advice()
    assert any("larger fsdp axis" in line for line in state)
    slow = plan(collective_seconds=(0.5, 0.01)).advice()
    assert any("communication takes longer" in line for line in slow)


def test_asynchronous_exchanges_hide_behind_compute():
    assert plan().exposed_seconds == pytest.approx(0.03)
    assert plan().step_seconds == pytest.approx(0.28)
    late = plan(collective_seconds=(0.03, 0.30))
    assert late.exposed_seconds == pytest.approx(0.03 + 0.05)
    assert plan().mfu == pytest.approx(2.3e15 / 0.28 / (64 * 459e12))


def test_a_replay_says_what_is_waited_for():
    assert plan(waited_seconds=0.02).exposed_seconds == 0.02


def test_a_call_of_a_kernel_by_roofline():
    kernels = [
        Kernel("matmul", 2, 459e9, 1.0),
        Kernel("copy", 3, 0.0, 2765e6),
        Kernel("matmul_backward", 1, 459e10, 1.0),
    ]
    seconds = estimate.call_seconds(kernels, V5P)
    assert [seconds(name) for name in ("matmul.4", "copy", "transpose_jvp_matmul_backward__.1")] == pytest.approx(
        [1e-3, 1e-3, 1e-2]
    )


def test_report_marks_estimates_and_json_agrees():
    text = report.text(plan())
    assert "fits" in text and text.count("ESTIMATE") >= 4
    found = json.loads(report.as_json([plan()]))
    assert found["estimate"] is True and found["memory"]["peak"] == pytest.approx(1.8e9)
    assert found["collectives"][0]["moved"] == pytest.approx(168 * 18.9e6 * 7 / 8)
    assert found["seconds"]["step"] == pytest.approx(plan().step_seconds)
    assert "DOES NOT FIT" in report.text(plan(memory=estimate.Memory(1e12, 0)))


def test_report_lists_kernels_longest_first():
    parts = {"short": (28, 0.001), "a_kernel_with_a_long_name": (56, 0.0485)}
    named = plan(kernel_parts=parts)
    rows = report.text(named).splitlines()
    at = next(i for i, row in enumerate(rows) if "a_kernel" in row)
    assert rows[at].split() == ["a_kernel_with_a_long_name", "48.5", "ms", "in", "56", "calls"]
    assert rows[at + 1].split()[0] == "short"
    assert rows[at].index("48.5") == rows[at + 1].index("1.0 ms")  # one column
    assert json.loads(report.as_json([named]))["kernel_parts"]["short"] == {"calls": 28, "seconds": 0.001}
