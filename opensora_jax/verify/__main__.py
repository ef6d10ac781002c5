"""python -m opensora_jax.verify PATH... [--json] [--family F]

Replays recorded cases through conversion and our code, in float32 on the CPU. A path is a case folder or a folder of
cases. Exit code 0: all within tolerance; 1: some are not; 2: an unknown family or a malformed case (a line for each at
the end; the other cases are replayed all the same).
"""

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
import traceback
from pathlib import Path

from opensora_jax.common.errors import UserError, guarded


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m opensora_jax.verify", description="Replay recorded reference activations through our models."
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a case folder, or a folder of case folders")
    parser.add_argument("--json", action="store_true", help="one JSON object a compared output, and nothing else")
    parser.add_argument("--family", help="only cases of this family (the slug in case.json, or our name for it)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def case_folders(paths: list[str]) -> list[Path]:
    folders = []
    for path in map(Path, paths):
        found = [path] if (path / "case.json").exists() else sorted(p.parent for p in path.glob("*/case.json"))
        if not found:
            raise UserError(f"{path} holds no case.json, nor folders that do; see docs/convert.md for the schema")
        folders += found
    return folders


def adapters() -> dict:
    """Every family that a module in verify/adapters/ serves; the file system is the registry."""
    from opensora_jax.verify import adapters as room

    families: dict = {}
    for module in pkgutil.iter_modules(room.__path__):
        families |= importlib.import_module(f"{room.__name__}.{module.name}").FAMILIES
    return families


def verify_case(case, adapter) -> list:
    """All comparisons of a case. What was recorded and we do not expose is counted by the caller, never skipped for
    final outputs: an output without a counterpart fails."""
    from opensora_jax.verify import compare

    results, seen = [], set()
    labels = lambda run, output: {"case": case.name, "family": case.family, "run": run, "output": output}
    if adapter.tables is not None:
        results += [compare.same(labels("", name), ours, recorded) for name, ours, recorded in adapter.tables(case)]
    if adapter.replay is not None and case.outputs:
        for run in case.runs:
            ours = adapter.replay(case, run)
            recorded = case.recorded(run)
            for name, full in recorded.items():
                if name in ours and full not in seen:
                    seen.add(full)
                    tolerance = case.tolerance(full)
                    results.append(compare.compare(labels(run, name), ours[name], case.outputs[full], tolerance))
    absent = [name for name in case.outputs if name not in seen and "inter." not in name]
    for name in absent:
        nothing = {"max_abs": float("inf"), "rel_l2": float("inf")}
        results.append(
            compare.Comparison(
                **labels("", name),
                **nothing,
                tolerance=case.tolerance(name),
                ok=False,
                note="our code gave no such output",
            )
        )
    if not results:
        raise UserError(f"{case.folder}: nothing to compare; the case records no outputs and no tables")
    return results


def report(case, results, seconds: float) -> bool:
    worst = max(results, key=lambda r: (not r.ok, r.worst))
    recorded = [name for name in case.outputs if "inter." in name]
    compared = sum(r.output.startswith("inter.") for r in results)
    ok = all(r.ok for r in results)
    inter = f"inter {compared}/{len(recorded)}" if recorded else ""
    print(
        f"{'ok  ' if ok else 'FAIL'} {case.name:32s} {case.family:26s} runs {len(case.runs):2d}  outputs {len(results):3d}"
        f"  {inter:12s} worst {worst.max_abs:.1e} abs, {worst.rel_l2:.1e} rel ({worst.worst:.0%} of tolerance)"
        f"  {seconds:5.1f} s",
        flush=True,
    )
    for bad in (r for r in results if not r.ok):
        tolerance = f"tolerance {bad.tolerance}" if bad.tolerance else "must be exact"
        print(
            f"     {bad.run}/{bad.output}: max_abs {bad.max_abs:.3e}, rel_l2 {bad.rel_l2:.3e}, {tolerance} {bad.note}"
        )
    return ok


def read(folders: list[Path], known: dict, family: str | None) -> tuple[list, list[str]]:
    """The cases asked for, and a line for each that is malformed or that no adapter replays."""
    from opensora_jax.verify.case import Case

    cases, troubles, others = [], [], set()
    for folder in folders:
        try:
            case = Case(folder)
        except UserError as error:
            troubles.append(str(error))
            continue
        if family and family not in (case.family, known[case.family].stem if case.family in known else None):
            others.add(case.family)
        elif case.family not in known:
            troubles.append(f"{folder}: no adapter replays {case.family!r}; known families: {', '.join(sorted(known))}")
        else:
            cases.append(case)
    if family and not cases and not troubles:
        raise UserError(f"no case of family {family!r} here, only of {', '.join(sorted(others))}")
    return cases, troubles


def replayed(case, adapter) -> list:
    """All comparisons of a case. What its adapter cannot make sense of is taken for a fault of the recording."""
    try:
        return verify_case(case, adapter)
    except UserError as error:
        raise UserError(f"{case.folder}: {error}") from error
    except Exception as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]
        raise UserError(
            f"{case.folder} cannot be replayed ({type(error).__name__}: {what}); is an input or an argument missing, or of "
            "another shape? --debug shows where"
        ) from error


def main(argv=None) -> int:
    args = arguments(argv)
    folders = case_folders(args.paths)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    known = adapters()
    cases, troubles = read(folders, known, args.family)
    total, failures = len(cases) + len(troubles), 0
    for case in cases:
        started = time.time()
        try:
            results = replayed(case, known[case.family])
        except UserError as error:
            troubles.append(str(error))
            if args.debug:
                traceback.print_exc()
            continue
        if args.json:
            print("\n".join(json.dumps(result.json()) for result in results), flush=True)
            failures += not all(result.ok for result in results)
        else:
            failures += not report(case, results, time.time() - started)
    if not args.json:
        print(f"{total - failures - len(troubles)} of {total} cases ok")
    for trouble in troubles:
        print(f"error: {trouble}", file=sys.stderr)
    return 2 if troubles else int(failures > 0)


if __name__ == "__main__":
    sys.exit(guarded(main))
