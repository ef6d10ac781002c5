"""Reading optimized HLO: loops multiply, collectives are recognised in each of their spellings."""

import pytest

from opensora_jax.plan import hlo

# Cut from a compiled STDiT step on v5p:4x4x4 (mesh data 2, fsdp 4, context 8): long attributes shortened.
STEP = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(s32[])->s32[]}

%fused.1 (param_0: bf16[8,16]) -> bf16[8,16] {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[8,16]{1,0:T(8,128)(2,1)} copy(%param_0), backend_config={"window_config":{"estimated_cycles":"77"}}
}

%all-reduce-scatter.5 (param_0.1: bf16[1152,1536]) -> bf16[1152,48] {
  %param_0.1 = bf16[1152,1536]{0,1:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[1152,1536]{0,1:T(8,128)(2,1)} all-reduce(%param_0.1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31},{32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51,52,53,54,55,56,57,58,59,60,61,62,63}}, to_apply=%add.1
  ROOT %dynamic-slice.1 = bf16[1152,48]{0,1:T(8,128)(2,1)} dynamic-slice(%all-reduce.7, %p, %q), dynamic_slice_sizes={1152,48}
}

%body.1 (carry: (s32[], bf16[1,8,1024,1152])) -> (s32[], bf16[1,8,1024,1152]) {
  %carry = (s32[]{:T(128)}, /*index=1*/bf16[1,8,1024,1152]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %fusion.1 = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %stdit_spatial.4 = bf16[8,1024,1152]{2,1,0:T(8,128)(2,1)} custom-call(%fusion.1), custom_call_target="tpu_custom_call", metadata={source "a
}
} and more" }, backend_config={"custom_call_config": {"body": "}"}}
  %all-to-all.27 = bf16[1,8,8,128,1152]{4,3,1,0,2:T(8,128)(2,1)} all-to-all(%copy.695), channel_id=4, replica_groups=mesh['axis_0'=8,'axis_1'=8] {'axis_1'}, dimensions={2}
  %all-gather.1 = bf16[1,1152,3456]{2,0,1:T(2,128)(2,1)} all-gather(%copy.692), channel_id=185, replica_groups=mesh['axis_0'=2,'axis_1'=32] {'axis_1'}, dimensions={1}
  %fusion.977 = bf16[1152,48]{0,1:T(8,128)(2,1)} fusion(%copy-done.41), kind=kCustom, calls=%all-reduce-scatter.5
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[1,8,1024,1152]{3,2,1,0:T(8,128)(2,1)}) tuple(%i, %y)
}

%condition.1 (carry.1: (s32[], bf16[1,8,1024,1152])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(28), backend_config={"flag_configs":[]}
  %carry.1 = (s32[]{:T(128)}, bf16[1,8,1024,1152]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt.95 = pred[]{:T(512)} compare(%i.1, %constant.2), direction=LT
}

ENTRY %main.1 (p0: s32[]) -> s32[] {
  %p0 = s32[]{:T(128)} parameter(0)
  %g0 = f32[1,6,1152]{0,1,2:T(8,128)} bitcast(%q0)
  %copy.2 = f32[1,6,1152]{2,1,0:T(8,128)} copy(%g0), backend_config={"window_config":{"estimated_cycles":"5"}}
  %while.1 = (s32[]{:T(128)}, bf16[1,8,1024,1152]{3,2,1,0:T(8,128)(2,1)}) while(%tuple.0), condition=%condition.1, body=%body.1
  %all-reduce.1 = f32[4,1152]{1,0:T(4,128)} all-reduce(%g), channel_id=9, replica_groups=[8,8]<=[8,8]T(1,0), to_apply=%add.1
  %collective-permute-start = (bf16[1152,36]{0,1:T(8,128)(2,1)}, bf16[1152,36]{0,1:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice.469), channel_id=1, source_target_pairs={{0,8},{1,9}}
  ROOT %out = s32[]{:T(128)} copy(%p0)
}
"""
MESH = {"data": 2, "fsdp": 4, "context": 8}


@pytest.fixture(scope="module")
def contents():
    return hlo.contents(hlo.parse(STEP), MESH)


def test_cycles_of_loop_bodies_count_as_often_as_they_run(contents):
    assert contents.cycles == 28 * 1000  # what lies inside a fusion is part of the fusion


def test_copies_outside_fusions_count_by_their_traffic(contents):
    assert contents.traffic == 2 * 6 * 1152 * 4 + 2 * 4


def test_kernels_survive_raw_newlines_in_their_metadata(contents):
    assert contents.kernel_calls == {"stdit_spatial.4": 28}


def test_collectives_by_kind_axes_and_bytes(contents):
    found = {c.kind: c for c in contents.collectives}
    exchange = found["all-to-all"]
    assert (exchange.axes, exchange.size, exchange.count) == (("context",), 8, 28)
    assert exchange.bytes == 8 * 8 * 128 * 1152 * 2
    assert exchange.moved == 28 * exchange.bytes * 7 / 8
    gather = found["all-gather"]
    assert (gather.axes, gather.size, gather.bytes) == (("fsdp", "context"), 32, 1152 * 3456 * 2)
    scatter = found["reduce-scatter"]  # written as a fusion of an all-reduce and a slice
    assert (scatter.axes, scatter.count, scatter.moved) == (("fsdp", "context"), 28, 28 * 1152 * 1536 * 2 * 31 / 32)
    reduce = found["all-reduce"]
    assert (reduce.axes, reduce.size, reduce.moved) == (("data", "fsdp"), 8, 2 * 4 * 1152 * 4 * 7 / 8)
    shift = found["collective-permute"]
    assert shift.asynchronous and shift.axes == ("fsdp",) and shift.moved == 1152 * 36 * 2
    assert len(contents.collectives) == 5


@pytest.mark.parametrize(
    "groups, members",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'b'}", [0, 2]),
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_in_every_spelling(groups, members):
    assert hlo._members(groups, 8) == members


def test_a_known_trip_count_is_believed():
    text = STEP.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.contents(hlo.parse(text), MESH).cycles == 3 * 1000


def test_bytes_of_types():
    assert hlo.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[], pred[7]{0})") == [
        ("bf16", 12),
        ("f32", 4),
        ("pred", 7),
    ]
