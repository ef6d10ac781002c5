"""Plans of named full-size steps, each in a process of its own: what they need, and what planning them costs here.

    pip install 'opensora-jax[aot]'                     # libtpu; no TPU is needed
    python -m benchmarks.plans --list
    python -m benchmarks.plans stage3-v5p stdit-v6e     # a table
    python -m benchmarks.plans --group compile          # compile time of the three named steps
    python -m benchmarks.plans --group scaling          # 8, 64, 256 chips of v6e; up to 1024 of v5p
    python -m benchmarks.plans --group long --json=FILE # every figure; what FILE holds already is not compiled again

Every figure about the accelerator is an ESTIMATE of the planner; wall and CPU seconds and host memory are measured.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

STDIT = "configs/v1_0/stdit.py"


@dataclass(frozen=True)
class Case:
    name: str
    groups: tuple[str, ...]
    config: str
    topology: str
    flags: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return ["opensora_jax.plan", f"--config={self.config}", f"--topology={self.topology}", *self.flags]


WITHIN_32_GB = ("--mesh=fsdp=8,context=8,rules=fsdp_context",)
ONE_GROUP = ("--mesh=fsdp=1,context=8,rules=fsdp_context",)
CASES = (
    Case("stdit-v5p", ("compile", "required", "scaling"), STDIT, "v5p:4x4x4"),
    Case("stage3-v5p", ("compile", "required"), "configs/stage3.py", "v5p:4x4x4"),
    Case("mmdit-v5p", ("compile", "required"), "configs/v2_0/mmdit_768px.py", "v5p:8x8x8"),
    Case("stdit-v6e", ("required", "scaling"), STDIT, "v6e:8x8"),
    Case("stdit-whole-v6e", ("required",), f"{STDIT}:whole_clips", "v6e:8x8"),
    Case("stage3-v6e", ("required",), "configs/stage3.py", "v6e:8x8", WITHIN_32_GB),
    Case("minute-1080p", ("long",), f"{STDIT}:minute_1080p", "v5p:2x2x2"),
    Case("dit-800k", ("long",), "configs/v1_0/dit_long.py", "v5p:2x2x2"),
    Case("stdit-v6e-8", ("scaling",), STDIT, "v6e:2x4", ONE_GROUP),
    Case("stdit-v6e-256", ("scaling",), STDIT, "v6e:16x16"),
    Case("stdit-v5p-8", ("scaling",), STDIT, "v5p:2x2x2", ONE_GROUP),
    Case("stdit-v5p-1024", ("scaling",), STDIT, "v5p:8x8x16"),
)
COLUMNS = (
    "case", "topology", "mesh", "peak GB", "fits", "step ms", "exposed ms", "MFU", "scaling", "sent GB", "wall s",
    "CPU s", "host GiB",
)  # fmt: skip


def measure(case: Case, timeout: int) -> dict:
    """One plan in a child: its own JSON, and what the child cost."""
    command = [sys.executable, "-m", *case.command, "--json"]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = threading.Timer(timeout, child.kill)
    ended.start()
    with child, ThreadPoolExecutor(1) as reader:
        error = reader.submit(child.stderr.read)
        out = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)  # of this child alone
        child.returncode = os.waitstatus_to_exitcode(status)
    ended.cancel()
    cost = {
        "wall_seconds": time.monotonic() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "host_gib": used.ru_maxrss / 2**20,
        "load": os.getloadavg()[0],
    }
    record = {"case": case.name, "command": " ".join(case.command), "cost": cost}
    if child.returncode < 0 and cost["wall_seconds"] >= timeout:
        return record | {"error": f"not done in {timeout} s"}
    if child.returncode:
        return record | {"error": (error.result().strip().splitlines() or ["failed"])[-1][:300]}
    return record | {"plan": json.loads(out)}


def row(record: dict, records: dict[str, dict]) -> str:
    if "error" in record:
        return f"| {record['case']} | {record['error']} |"
    plan, cost = record["plan"], record["cost"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = [
        record["case"], plan["topology"], mesh, f"{plan['memory']['peak'] / 1e9:.2f}", "yes" if plan["fits"] else "no",
        f"{plan['seconds']['step'] * 1e3:,.0f}", f"{plan['seconds']['exposed'] * 1e3:,.1f}", f"{plan['mfu']:.1%}",
        scaling(record["case"], records), f"{sum(c['moved'] for c in plan['collectives']) / 1e9:.2f}",
        f"{cost['wall_seconds']:.0f}", f"{cost['cpu_seconds']:.0f}", f"{cost['host_gib']:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def scaling(name: str, records: dict[str, dict]) -> str:
    """Tokens a second and chip against those of 8 chips of the same kind."""
    kind = "-".join(name.split("-")[:2])
    if name == f"{kind}-8" or "plan" not in records.get(f"{kind}-8", {}):
        return ""
    speed = lambda plan: plan["tokens"] / plan["seconds"]["step"] / plan["chips"]
    return f"{speed(records[name]['plan']) / speed(records[f'{kind}-8']['plan']):.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = sorted({group for case in CASES for group in case.groups})
    parser.add_argument("cases", nargs="*", help="names; --list shows them")
    parser.add_argument("--group", choices=groups, help="all cases of a group")
    parser.add_argument("--list", action="store_true")
    parser.add_argument(
        "--timeout", type=int, default=3600, metavar="SECONDS", help="a case (3600: the machine may be crowded)"
    )
    parser.add_argument("--json", metavar="FILE", help="keep the records here, and take from here what is known")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no case is called {', '.join(sorted(unknown))}; --list shows them")
    if arguments.list:
        print("\n".join(f"{c.name:16s}{' '.join(c.groups):28s}python -m {' '.join(c.command)}" for c in CASES))
        return 0
    wanted = [c for c in CASES if c.name in arguments.cases or arguments.group in c.groups]
    if not wanted:
        parser.error("name cases or a --group; --list shows them")
    file = Path(arguments.json) if arguments.json else None
    records = {r["case"]: r for r in json.loads(file.read_text())} if file and file.exists() else {}
    for case in wanted:
        known = records.get(case.name, {})
        if "plan" in known and known["command"] == " ".join(case.command):
            continue
        records[case.name] = measure(case, arguments.timeout)
        print(f"{case.name}: {records[case.name].get('error', 'done')}", file=sys.stderr)
        if file:
            file.write_text(json.dumps(list(records.values()), indent=1) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    print("\n".join(row(records[case.name], records) for case in wanted))
    return int(any("error" in records[case.name] for case in wanted))


if __name__ == "__main__":
    sys.exit(main())
