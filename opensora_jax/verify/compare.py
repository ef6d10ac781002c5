"""Our outputs against recorded ones, at the recorded tolerance, and nothing else."""

import math
import sys
from dataclasses import asdict, dataclass

import numpy as np

NEAR_ZERO = 1e-6  # below this absolute difference a tensor of (nearly) zeros counts as equal
SMALL = 1e-3  # of a single number below this, one bound is enough


@dataclass(frozen=True)
class Comparison:
    case: str
    family: str
    run: str
    output: str
    max_abs: float
    rel_l2: float
    tolerance: dict | None
    ok: bool
    note: str = ""

    def json(self) -> dict:
        """JSON has no infinity: the largest number stands for it."""
        most = {key: min(getattr(self, key), sys.float_info.max) for key in ("max_abs", "rel_l2")}
        return asdict(self) | most

    @property
    def worst(self) -> float:
        """How much of the tolerance was used; above 1 fails."""
        if not self.tolerance:
            return 0.0 if self.ok else math.inf
        shares = [getattr(self, key) / self.tolerance[key] for key in ("max_abs", "rel_l2") if self.tolerance.get(key)]
        return max(shares, default=0.0)


def compare(labels: dict, ours, recorded: np.ndarray, tolerance: dict | None) -> Comparison:
    ours = np.asarray(ours)
    fail = lambda note: Comparison(
        **labels, max_abs=math.inf, rel_l2=math.inf, tolerance=tolerance, ok=False, note=note
    )
    if ours.shape != recorded.shape:
        return fail(f"shape {list(ours.shape)}, recorded {list(recorded.shape)}")
    a, b = ours.astype(np.float64), recorded.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return fail("not-a-number or infinity where the recording has none, or the reverse")
    difference = a[finite] - b[finite]
    max_abs = float(np.abs(difference).max(initial=0.0))
    scale = float(np.linalg.norm(b[finite]))
    rel_l2 = float(np.linalg.norm(difference)) / scale if scale else max_abs
    if not tolerance:  # integers, booleans: exact
        whole = ours.dtype.kind in "iub" and recorded.dtype.kind in "iub"
        exact = np.array_equal(ours, recorded) if whole else np.array_equal(a, b, equal_nan=True)
        return Comparison(**labels, max_abs=max_abs, rel_l2=rel_l2, tolerance=None, ok=exact)
    within = (max_abs <= tolerance.get("max_abs", math.inf), rel_l2 <= tolerance.get("rel_l2", math.inf))
    near_zero = max_abs < NEAR_ZERO or (recorded.size == 1 and scale < SMALL and any(within))
    return Comparison(**labels, max_abs=max_abs, rel_l2=rel_l2, tolerance=tolerance, ok=all(within) or near_zero)


def same(labels: dict, ours, recorded) -> Comparison:
    """Tables: equal in structure; floats to one part in a million."""
    where = difference(ours, recorded)
    return Comparison(
        **labels,
        max_abs=math.inf if where else 0.0,
        rel_l2=math.inf if where else 0.0,
        tolerance=None,
        ok=not where,
        note=where,
    )


def difference(ours, recorded, path: str = "") -> str:
    """The first place where two nested tables differ, or nothing."""
    if isinstance(recorded, dict) and isinstance(ours, dict):
        if set(ours) != set(recorded):
            return f"{path or 'table'}: keys differ: {sorted(map(str, set(ours) ^ set(recorded)))[:5]}"
        return next((w for k in recorded if (w := difference(ours[k], recorded[k], f"{path}.{k}"))), "")
    if isinstance(recorded, (list, tuple)) and isinstance(ours, (list, tuple)):
        if len(ours) != len(recorded):
            return f"{path or 'table'}: length {len(ours)}, recorded {len(recorded)}"
        return next((w for i, (a, b) in enumerate(zip(ours, recorded)) if (w := difference(a, b, f"{path}[{i}]"))), "")
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    if number(ours) and number(recorded):
        return (
            "" if math.isclose(ours, recorded, rel_tol=1e-6, abs_tol=1e-9) else f"{path}: {ours}, recorded {recorded}"
        )
    return "" if ours == recorded else f"{path}: {ours!r}, recorded {recorded!r}"
