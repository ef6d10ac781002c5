"""The static estimate: reading a schedule, and (where libtpu is installed) compiling ahead of time."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.tpu_schedule import REPRESENTATIVE, relayouts
from opensora_jax import work
from opensora_jax.kernels import blocks, spec
from opensora_jax.kernels.stdit import stdit_attention
from opensora_jax.plan import hlo
from opensora_jax.plan.bundles import Counts, Schedule, call_seconds, kernel_name, of_kernel, read_schedule

TEXT = """\
LH: loop header
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %a = sld }
   0x2   : > { %b = sld }
   0x3 LB: >> { %c = vld }
   0x4   : > { %e = sld }
   0x5   : >> { %p = scmp.ge.s32.totalorder %i, 8 /* loop exit test */ }
   0x6 LB: >> { %c = vld }
   0x7   : >> { %p = scmp.ge.s32.totalorder %i, 3 /* loop exit test */ }
   0x8 PF: > { %d = vst }
   0x9   : > { %p = scmp.ge.s32.totalorder %i, 66 /* loop exit test */ }
"""
USED = "\n".join(f"0 0 0 0 0 0 0 0 {line} 0" for line in ("2 2", "0 0", "1 0", "0 0", "2 1", *["0 0"] * 6))


def test_bundles_and_trips_are_counted():
    schedule = read_schedule(TEXT, USED)
    assert (schedule.steps, schedule.step.bundles) == (64, 5 + 2 * 8 + 2 * 3)
    assert schedule.spills_of_slots() == 8 / (2 * 27) and schedule.spills_of_stores() == 8 / (1 + 16)
    assert schedule.cycles() == 64 * 27
    schedule = Schedule(4, Counts(1000, 300, 200), Counts(600, 100, 80), slots=2)
    assert schedule.cycles(2) == 4 * 700
    assert schedule.spills_of_slots(2) == 160 / 1400 and schedule.spills_of_stores(2) == 160 / 250


@pytest.mark.parametrize("name", ["stdit_spatial.3", "transpose_jvp_stdit_spatial__.1"])
def test_a_kernel_is_found_by_its_name(tmp_path, name):
    for other, steps in ((name, 66), ("stdit_spatial_backward.1", 10)):
        (tmp_path / f"17-{other}-72-final_bundles.txt").write_text(TEXT.replace(" 66 ", f" {steps} "))
        (tmp_path / f"17-{other}-72-final_hlo-static-per-bundle-utilization.txt").write_text(USED)
    assert of_kernel(tmp_path, "stdit_spatial").steps == 64


def test_calls_that_are_alike_share_a_schedule(tmp_path):
    for name, steps in (("modulated_linear.1", 66), ("modulated_linear.2", 10)):
        (tmp_path / f"17-{name}-72-final_bundles.txt").write_text(TEXT.replace(" 66 ", f" {steps} "))
        (tmp_path / f"17-{name}-72-final_hlo-static-per-bundle-utilization.txt").write_text(USED)
    call = 'bf16[8,128]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call"'
    module = hlo.parse(f"""\
ENTRY %main {{
  %a = bf16[8,64]{{1,0}} parameter(0)
  %b = bf16[64,128]{{1,0:S(1)}} parameter(1)
  %modulated_linear.1 = {call}
  %modulated_linear.2 = {call.replace("%a, ", "")}
  %modulated_linear.7 = {call.replace("%a, ", "")}
}}
""")
    seconds = call_seconds(tmp_path, 1e9, module.alike(), {})
    assert seconds("modulated_linear.7") == seconds("modulated_linear.2") < seconds("modulated_linear.1")
    assert seconds("modulated_linear.9") == seconds("modulated_linear.1")  # unknown: the longest of its kind


def test_an_instruction_says_its_kernel():
    for instruction in ("stdit_spatial.3", "transpose_jvp_stdit_spatial__.1", "jvp_stdit_spatial_", "stdit_spatial"):
        assert kernel_name(instruction) == "stdit_spatial"
    assert kernel_name("transpose_jvp_stdit_spatial_backward__.12") == "stdit_spatial_backward"


def test_work_for_one_step_of_a_row_counts_once_a_row(tmp_path):
    """Regions inside the pipeline's own, which skips steps beyond the last, with the loops in them."""
    lines = lambda level, count: [f"   0x0   : {level} {{ %x = vld }}"] * count
    text = [
        "   0x1 LB: > { %a = sld }",
        "   0x2   : > { %b = sbr.rel (%p1) target = $region1 }",
        "   0x3   : > { %b = sbr.rel (!%p2) target = $region2 }",
        *lines(">", 600),
        "   0x0 LB: >> { %y = vld }",
        *lines(">>", 9),
        "   0x0   : >> { %q = scmp.ge.s32.totalorder %j, 5 /* loop exit test */ }",
        "   0x8 PF: > { %d = vst } /* Start/End empty region 2 */",
        "   0x0 LB: >> { %y = vld }",
        "   0x0   : >> { %q = scmp.ge.s32.totalorder %j, 7 /* loop exit test */ }",
        "   0x9 PF: > { %d = vst } /* Start/End empty region 1 */",
        "   0x9   : > { %p = scmp.ge.s32.totalorder %i, 66 /* loop exit test */ }",
    ]
    (tmp_path / "17-stdit_spatial.1-72-final_bundles.txt").write_text("\n".join(text))
    (tmp_path / "17-stdit_spatial.1-72-final_hlo-static-per-bundle-utilization.txt").write_text(USED)
    bundles = lambda steps: call_seconds(tmp_path, 1.0, {}, steps)("stdit_spatial.1") / 64
    once = 600 + 5 * 11
    assert bundles({}) == once + 7 * 2 + 6
    assert bundles({"stdit_spatial": 4}) == once / 4 + 7 * 2 + 6


def test_steps_of_a_row_follow_the_kernel():
    def steps(mode):
        attend = functools.partial(stdit_attention, num_heads=4, mode=mode, implementation="pallas_tpu")
        with spec.target("v6e"):
            return work.count(
                jax.make_jaxpr(lambda x: attend(x))(jax.ShapeDtypeStruct((1, 16, 1024, 1152), "bfloat16"))
            )

    with blocks.trying("stdit_spatial", forward=(256,)):
        assert steps("spatial").steps_a_row() == {"stdit_spatial": 4}
    assert steps("temporal").steps_a_row() == {"stdit_temporal": 64}


def test_relayouts_are_found_inside_fusions():
    text = """\
HloModule m

fused {
  p = bf16[1024,1024]{1,0} parameter(0)
  ROOT t = bf16[1024,1024]{0,1} transpose(p), dimensions={1,0}
}

ENTRY main {
  x = bf16[1024,1024]{1,0} parameter(0)
  small = bf16[8,128]{1,0} copy(x)
  ROOT f = bf16[1024,1024]{0,1} fusion(x), kind=kLoop, calls=fused
}
"""
    assert relayouts(text) == ["transpose bf16[1024,1024]{0,1}"]


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot)")
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_compiles_ahead_of_time_without_relayouts_and_with_few_spills(name):
    command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--chips", "v6e", "--cases", name]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {name} | forward | v6e | ")]
    *_, of_slots, _, moved = line.removesuffix(" |").split(" | ")
    assert moved == "0", line
    assert float(of_slots.rstrip("%")) <= 20, line
