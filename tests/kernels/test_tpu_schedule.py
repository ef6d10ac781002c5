"""The static estimate: reading a schedule, and (where libtpu is installed) compiling ahead of time."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_schedule import grid
from opensora_jax.plan.bundles import Schedule, read_schedule
from tests.kernels.cases import BY_NAME

TEXT = """\
LH: loop header
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %a = sld }
   0x2   : > { %b = sld }
   0x3 LB: > > { %c = vld }
   0x4   : > > { %p = scmp.ge.s32.totalorder %i, 8 /* loop exit test */ }
   0x5 PF: > { %d = vst }
   0x6   : > { %p = scmp.ge.s32.totalorder %i, 66 /* loop exit test */ }
"""


def test_bundles_and_trips_are_counted():
    schedule = read_schedule(TEXT, "0 0 0 0 0 0 0 0 1 1 0\n0 0 0 0 0 0 0 0 1 0 0\n")
    assert schedule == Schedule(step=4, inner=2, trips=8, once=0, spill_share=0.5)
    assert schedule.cycles(10, 1) == 10 * (4 + 16)
    assert Schedule(1000, 0, 1, 600, 0.0).cycles(4, 2) == 4 * 700


def test_grids_follow_the_kernels():
    assert grid(BY_NAME["v1.0 temporal T=16"], False) == (16 * 64, 1)
    assert grid(BY_NAME["v1.0 spatial 64x512"], False) == (128, 2)
    assert grid(BY_NAME["v1.0 spatial 64x512"], True) == (64, 1)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot)")
def test_compiles_ahead_of_time():
    command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--chips", "v5e", "--cases", "v1.0 temporal T=16"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert "| v1.0 temporal T=16 | forward | v5e | " in done.stdout, done.stderr[-2000:]
