"""What a step waits for: exchanges that the compiler started early, on the wire and on the sparse cores, against the clock."""

import pytest

from opensora_jax.plan import hlo, replay

# As libtpu writes a program with exchanges on the sparse cores (v6e:8x8); attributes shortened.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%called_computation.8 (p.1: bf16[36,128]) -> bf16[1152,128] {
  %p.1 = bf16[36,128]{1,0} parameter(0)
  ROOT %all-gather.24 = bf16[1152,128]{1,0} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%async_computation.1 (p.2: bf16[36,128]) -> bf16[1152,128] {
  %p.2 = bf16[36,128]{1,0} parameter(0)
  ROOT %custom-call.5 = bf16[1152,128]{1,0} custom-call(%p.2), custom_call_target="offload", called_computations={%called_computation.8}
}

%body.1 (carry: (s32[])) -> (s32[]) {
  %carry = (s32[]) parameter(0)
  %gather-start = ((), (), (s32[8192]{0})) async-start(), async_execution_thread="sparsecore", calls=%async_computation.1
  %fusion.1 = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"3"}}
  %gather-update = ((bf16[36,128]{1,0}), bf16[1152,128]{1,0}, (s32[8192]{0})) async-update(%gather-start, %fusion.1)
  %fusion.2 = bf16[8,16]{1,0} fusion(%y), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"4"}}
  %gather-done = bf16[1152,128]{1,0} async-done(%gather-update)
  %fusion.3 = bf16[8,16]{1,0} fusion(%gather-done), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"1"}}
  ROOT %tuple.1 = (s32[]) tuple(%i)
}

%condition.1 (carry.1: (s32[])) -> pred[] {
  %constant.2 = s32[] constant(5)
  %carry.1 = (s32[]) parameter(0)
  ROOT %lt.1 = pred[] compare(%i.1, %constant.2), direction=LT
}

ENTRY %main.1 (p0: s32[]) -> s32[] {
  %p0 = s32[] parameter(0)
  %while.1 = (s32[]) while(%tuple.0), condition=%condition.1, body=%body.1
  %shift-start = (bf16[64]{0}, bf16[64]{0}, u32[], u32[]) collective-permute-start(%p0), channel_id=1, source_target_pairs={{0,4},{4,0}}
  %copy-start = (bf16[64]{0}, bf16[64]{0}, u32[]) copy-start(%p0)
  %copy-done = bf16[64]{0} copy-done(%copy-start)
  %exchange = bf16[1,8,128]{2,1,0} all-to-all(%p0), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  %shift-done = bf16[64]{0} collective-permute-done(%shift-start)
  ROOT %out = s32[] copy(%p0)
}
"""
MESH = {"data": 2, "context": 4}
SECONDS = {"all-gather": 10.0, "all-to-all": 20.0, "collective-permute": 7.0}


def waited(text: str) -> float:
    module = hlo.parse(text)
    exchange = lambda op: sum(SECONDS[c.kind] for c in hlo.exchanges(op, module, MESH))
    return replay.waited(module, exchange, lambda op: float(op.cycles))


def test_an_exchange_hides_behind_what_stands_between_its_operand_and_its_use():
    a_layer = 10 - 4  # what runs before the operand is there hides nothing
    assert waited(PROGRAM) == pytest.approx(5 * a_layer + 7 + 20)  # one exchange at a time: the shift delays the other


def test_nothing_is_waited_for_twice():
    patient = PROGRAM.replace('"estimated_cycles":"4"', '"estimated_cycles":"40"')
    assert waited(patient) == pytest.approx(7 + 20)


def test_exchanges_on_the_sparse_cores_are_counted():
    found = {c.kind: c for c in hlo.contents(hlo.parse(PROGRAM), MESH).collectives}
    gather = found["all-gather"]
    assert (gather.axes, gather.size, gather.count, gather.asynchronous) == (("context",), 4, 5, True)
    assert gather.bytes == 1152 * 128 * 2 and not found["all-to-all"].asynchronous
