"""The order of training: which clips make the global batch of every step, as a pure function of (seed, step).

Nothing here depends on processes, workers or time, so a run may stop at any step and go on with another number of either.
An epoch assigns each clip to a bucket, shuffles every bucket, cuts it into batches and shuffles the batches of all buckets.
"""

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.data.buckets import Bucket, BucketTable

_SHUFFLE_CLIPS, _SHUFFLE_BATCHES = 1, 2  # keep the two uses of one seed apart


@dataclass(frozen=True)
class Step:
    """One step: its bucket, where its clips lie in the bucket's order of this epoch, and that order."""

    step: int
    epoch: int
    bucket: Bucket
    start: int
    size: int  # of the global batch
    order: np.ndarray

    def clip(self, slot: int, attempt: int = 0) -> int:
        """The clip in a slot of the global batch; `attempt` > 0 gives its replacement after a bad record."""
        return int(self.order[(self.start + slot + attempt) % len(self.order)])


@dataclass(frozen=True)
class Epoch:
    buckets: list[Bucket]
    orders: list[np.ndarray]
    batches: np.ndarray  # [steps, 2]: bucket, first position in its order
    unassigned: np.ndarray  # clips without a bucket


class Plan:
    """Batches of a data set. `batch_scale` multiplies every batch size of the table (data-parallel shards of the mesh)."""

    def __init__(
        self,
        shapes: np.ndarray,
        table: BucketTable | None,
        *,
        seed: int = 0,
        intervals: np.ndarray | int = 1,
        batch_scale: int = 1,
        drop_last: bool = True,
        exact_batch_size: int | None = None,
    ):
        self.shapes = np.column_stack([shapes, np.broadcast_to(intervals, len(shapes))]).astype(np.int64)
        self.table, self.seed, self.batch_scale, self.drop_last = table, seed, batch_scale, drop_last
        self.exact_batch_size = exact_batch_size  # encoded records: every shape found is a bucket of its own
        self._kinds, self._kind_of = np.unique(self.shapes, axis=0, return_inverse=True)
        self._fixed = [self._certain(*kind.tolist()) for kind in self._kinds]
        self._drawn = [number for number, (certain, _) in enumerate(self._fixed) if not certain]
        self._epochs: dict[int, Epoch] = {}
        self._ends: list[int] = []  # the step after each epoch, as far as they have been counted
        self._lock = threading.RLock()  # the loader's threads share one plan

    def __getstate__(self):
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.RLock())

    def at(self, step: int) -> Step:
        """The clips of a step, counted from 0 over all epochs."""
        with self._lock:
            number, first = self._epoch_of(step)
            epoch = self.epoch(number)
        which, start = epoch.batches[step - first].tolist()
        bucket = epoch.buckets[which]
        return Step(step, number, bucket, start, bucket.batch_size * self.batch_scale, epoch.orders[which])

    def epoch(self, number: int) -> Epoch:
        with self._lock:
            if number not in self._epochs:
                for old in [old for old in self._epochs if abs(old - number) > 1]:
                    del self._epochs[old]
                self._epochs[number] = self._make_epoch(number)
            return self._epochs[number]

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; others differ a little where keep probabilities are below one."""
        return len(self.epoch(0).batches)

    def fingerprint(self) -> str:
        """Changes whenever the same (seed, step) would mean other clips; paths do not enter, so that data may move."""
        table = None
        if self.table:
            levels = {name: [vars(level) for level in self.table.levels[name]] for name in self.table.order}
            table = [self.table.version, self.table.aspect_first, self.table.area_tolerance, levels]
        facts = [table, self.seed, self.batch_scale, self.drop_last, self.exact_batch_size]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.shapes).tobytes())
        return digest.hexdigest()[:16]

    def check(self, *, allow_starving: bool = False) -> None:
        """Stops before training when a level of the table gets no clip, or too few for one batch; shows all counts."""
        rows = self.report()
        starving = [row for row in rows if row["note"]]
        if not any(row["batches"] for row in rows) or (starving and not allow_starving):
            short = f"{len(starving)} of {len(rows)} buckets have too few clips for one batch"
            what = "no bucket has enough clips for one batch" if len(starving) == len(rows) else short
            raise UserError(
                f"data: {what}: lower the batch size, take the rows out of data.buckets, add clips that fit, or set "
                "data.allow_starving=True to train on what there is",
                self.format_report(),
            )

    def report(self, epoch: int = 0) -> list[dict]:
        """A row a level of the table: clips, batches, aspect ratios in use and what is wrong with it."""
        made = self.epoch(epoch)
        batches = Counter(made.batches[:, 0].tolist())
        rows = {}
        if self.table:
            for name in self.table.order:
                for level in filter(lambda level: level.used, self.table.levels[name]):
                    rows[name, level.num_frames] = _row(name, level.num_frames, level.batch_size * self.batch_scale)
        for which, (bucket, order) in enumerate(zip(made.buckets, made.orders)):
            key = (bucket.resolution, bucket.num_frames)
            row = rows.setdefault(key, _row(*key, bucket.batch_size * self.batch_scale))
            row["clips"] += len(order)
            row["shapes"] += 1
            row["batches"] += batches[which]
            row["unused"] += len(order) - min(len(order), batches[which] * bucket.batch_size * self.batch_scale)
        for row in rows.values():
            if not row["clips"]:
                row["note"] = "empty: no clip is assigned here"
            elif not row["batches"]:
                row["note"] = f"starving: no shape has the {row['batch']} clips of one batch"
        return list(rows.values())

    def rejected(self, epoch: int = 0) -> dict[str, int]:
        """How many clips no bucket takes, by reason."""
        reasons = Counter()
        kinds, counts = np.unique(self._kind_of[self.epoch(epoch).unassigned], return_counts=True)
        for kind, count in zip(kinds.tolist(), counts.tolist()):
            frames, height, width, interval = self._kinds[kind].tolist()
            reasons[self._why_not(frames, height, width, interval)] += count
        return dict(reasons)

    def format_report(self, epoch: int = 0) -> str:
        rows = self.report(epoch)
        head = ("resolution", "frames", "batch", "shapes", "clips", "batches", "unused", "note")
        lines = [head, *([str(row[key]) for key in head] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        right = lambda cells: [cell.rjust(width) for cell, width in zip(cells, widths)]
        text = ["  ".join([*right(line), line[-1]]).rstrip() for line in lines]
        lost = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected(epoch).items()))
        total = f"{len(self.shapes)} clips, {sum(row['batches'] for row in rows)} steps an epoch"
        return "\n".join([*text, total + (f"; without a bucket: {lost}" if lost else "")])

    def _certain(self, frames, height, width, interval):
        if self.exact_batch_size is None:
            return self.table.certain(frames, height, width, interval=interval)
        found = self.table.find(frames, height, width) if self.table else None
        if found is None and frames:
            found = Bucket("encoded", frames, f"{height / width:.2f}", height, width, self.exact_batch_size)
        return True, found

    def _why_not(self, frames, height, width, interval):
        return self.table.why_not(frames, height, width, interval=interval) if self.table else "unreadable"

    def _make_epoch(self, number: int) -> Epoch:
        names = sorted({bucket for _, bucket in self._fixed if bucket})
        index = {bucket: i for i, bucket in enumerate(names)}
        of_kind = np.array([index.get(bucket, -1) for _, bucket in self._fixed], np.int64)
        of_clip = of_kind[self._kind_of]
        for kind in self._drawn:
            frames, height, width, interval = self._kinds[kind].tolist()
            for clip in np.flatnonzero(self._kind_of == kind).tolist():
                seed = self.seed + number + clip * self.table.num_buckets
                bucket = self.table.assign(frames, height, width, interval=interval, seed=seed)
                if bucket:
                    of_clip[clip] = index.setdefault(bucket, len(index))
        buckets = list(index)
        by_bucket = np.argsort(of_clip, kind="stable")
        edges = np.searchsorted(of_clip[by_bucket], np.arange(len(buckets) + 1))
        orders, batches = [], []
        for which, bucket in enumerate(buckets):
            clips = by_bucket[edges[which] : edges[which + 1]]
            rng = np.random.default_rng([self.seed, number, _SHUFFLE_CLIPS, *bucket.shape])
            orders.append(rng.permutation(clips))
            size = _batch_size(bucket) * self.batch_scale
            count = len(clips) // size if self.drop_last else -(-len(clips) // size)
            batches.append(np.column_stack([np.full(count, which), np.arange(count) * size]))
        batches = np.concatenate([np.zeros((0, 2), np.int64), *batches])
        np.random.default_rng([self.seed, number, _SHUFFLE_BATCHES]).shuffle(batches)
        return Epoch(buckets, orders, batches, np.flatnonzero(of_clip < 0))

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, its first step)."""
        if not self._drawn:  # no draw: every epoch is as long as the first
            if not self._ends:
                self._ends = [self._checked(len(self.epoch(0).batches))]
            return step // self._ends[0], step // self._ends[0] * self._ends[0]
        while not self._ends or self._ends[-1] <= step:
            length = self._checked(len(self.epoch(len(self._ends)).batches))
            self._ends.append((self._ends[-1] if self._ends else 0) + length)
        number = int(np.searchsorted(self._ends, step, side="right"))
        return number, self._ends[number - 1] if number else 0

    def _checked(self, length: int) -> int:
        if not length:
            raise UserError("data: no bucket has enough clips for one batch", self.format_report())
        return length


def _row(resolution, frames, batch) -> dict:
    counts = {"shapes": 0, "clips": 0, "batches": 0, "unused": 0}
    return {"resolution": resolution, "frames": frames, "batch": batch, **counts, "note": ""}


def _batch_size(bucket: Bucket) -> int:
    if not isinstance(bucket.batch_size, int) or bucket.batch_size < 1:
        raise UserError(f"data.buckets: {bucket} needs a whole batch size of at least 1, got {bucket.batch_size!r}")
    return bucket.batch_size
