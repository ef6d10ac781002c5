"""Plans of named full-size steps, each in a process of its own: what they need, and what planning them costs here.

    pip install 'opensora-jax[aot]'                     # libtpu; no TPU is needed
    python -m benchmarks.plans --list
    python -m benchmarks.plans stage3-v5p stdit-v6e     # a table; --json=FILE keeps every figure
    python -m benchmarks.plans --group compile          # compile time of the three named steps
    python -m benchmarks.plans --group scaling          # 8, 64, 256 chips of v6e; up to 1024 of v5p

Every figure about the accelerator is an ESTIMATE of the planner; wall and CPU seconds and host memory are measured.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STDIT = "configs/v1_0/stdit.py"


@dataclass(frozen=True)
class Case:
    name: str
    group: str
    config: str
    topology: str
    flags: tuple[str, ...] = ()


CASES = (
    Case("stdit-v5p", "compile", STDIT, "v5p:4x4x4"),
    Case("stage3-v5p", "compile", "configs/stage3.py", "v5p:4x4x4"),
    Case("mmdit-v5p", "compile", "configs/v2_0/mmdit_768px.py", "v5p:8x8x8"),
    Case("stdit-v6e", "required", STDIT, "v6e:8x8"),
    Case("stage3-v6e", "required", "configs/stage3.py", "v6e:8x8"),
    Case("minute-1080p", "long", f"{STDIT}:minute_1080p", "v5p:2x2x2"),
    Case("dit-800k", "long", "configs/v1_0/dit_long.py", "v5p:2x2x2"),
    Case("v6e-8", "scaling", STDIT, "v6e:2x4", ("--mesh=fsdp=1,context=8",)),
    Case("v6e-64", "scaling", STDIT, "v6e:8x8"),
    Case("v6e-256", "scaling", STDIT, "v6e:16x16"),
    Case("v5p-8", "scaling", STDIT, "v5p:2x2x2", ("--mesh=fsdp=1,context=8",)),
    Case("v5p-64", "scaling", STDIT, "v5p:4x4x4"),
    Case("v5p-1024", "scaling", STDIT, "v5p:8x8x16"),
)
COLUMNS = (
    "case", "topology", "mesh", "peak GB", "step ms", "MFU", "exposed ms", "wall s", "CPU s", "host GiB",
)  # fmt: skip


def measure(case: Case, timeout: int) -> dict:
    """One plan in a child: its own JSON, and what the child cost."""
    command = [sys.executable, "-m", "opensora_jax.plan", f"--config={case.config}", f"--topology={case.topology}"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    child = subprocess.Popen(
        [*command, *case.flags, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, error = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"case": case.name, "error": f"not done in {timeout} s"}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {
        "wall_seconds": time.monotonic() - began,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "host_gib_at_most": after.ru_maxrss / 2**20,  # of the largest child so far
        "load": os.getloadavg()[0],
    }
    if child.returncode:
        return {"case": case.name, "error": (error.strip().splitlines() or ["failed"])[-1][:300], "cost": cost}
    return {
        "case": case.name,
        "command": " ".join(command[2:] + list(case.flags)),
        "plan": json.loads(out),
        "cost": cost,
    }


def row(record: dict) -> str:
    if "error" in record:
        return f"| {record['case']} | {record['error']} |"
    plan, cost = record["plan"], record["cost"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = [
        record["case"], plan["topology"], mesh,
        f"{plan['memory']['peak'] / 1e9:.2f}", f"{plan['seconds']['step'] * 1e3:,.0f}", f"{plan['mfu']:.1%}",
        f"{plan['seconds']['exposed'] * 1e3:,.1f}", f"{cost['wall_seconds']:.0f}", f"{cost['cpu_seconds']:.0f}",
        f"{cost['host_gib_at_most']:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = sorted({case.group for case in CASES})
    parser.add_argument("cases", nargs="*", help="names; --list shows them")
    parser.add_argument("--group", choices=groups, help="all cases of a group")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="a case (900)")
    parser.add_argument("--json", metavar="FILE", help="write the records here")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no case is called {', '.join(sorted(unknown))}; --list shows them")
    if arguments.list:
        print("\n".join(f"{c.name:14s}{c.group:10s}{c.config}  {c.topology}  {' '.join(c.flags)}" for c in CASES))
        return 0
    wanted = [c for c in CASES if c.name in arguments.cases or c.group == arguments.group]
    if not wanted:
        parser.error("name cases or a --group; --list shows them")
    records = []
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for case in wanted:
        records.append(measure(case, arguments.timeout))
        print(row(records[-1]), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(records, indent=1) + "\n")
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
