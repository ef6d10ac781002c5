"""Batches for training: `make_loader(config, start_step=…)` yields (batch, info) for every step from there on.

The global batch of step s follows from (seed, s) alone (plan.py); process p of n takes rows p·b to (p+1)·b of it. Random
crops and masks follow from (seed, s, row). So the position of a run is one number, and resuming on another number of
processes or workers gives the same batches, bit for bit. Grain reads ahead: in threads, or in `num_workers` processes.
"""

import math
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.common.progress import say
from opensora_jax.data.buckets import Bucket, BucketTable
from opensora_jax.data.buffers import BufferPool, Place, RowsOfBatch
from opensora_jax.data.masks import MaskGenerator, condition_frames, latent_frames, pick_mask_type
from opensora_jax.data.plan import Plan
from opensora_jax.data.plan import Step as PlannedStep
from opensora_jax.data.sources import JoinedSource, Source, media, open_source
from opensora_jax.data.transforms import crop, frame_indices, normalize, scaled_size
from opensora_jax.data.video_io import read_frames, resize

IMAGE_FPS = 120.0  # how the reference tells its networks that a clip is a still image
ATTEMPTS = 16  # replacements tried for one bad record before giving up
UNBOUNDED = 1 << 60


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how to cut it into batches."""

    source: str | tuple[str, ...] = "shapes:train"  # see sources.py; several are joined
    seed: int = 0
    batch_size: int = (
        8  # without `buckets`: of every batch; with records encoded ahead: where the table has no such shape
    )
    num_frames: int = 17  # without `buckets`: the one shape
    height: int = 64
    width: int = 64
    buckets: Mapping | None = None  # {resolution: {frames: (keep, batch_size)}}, see buckets.py
    bucket_version: str = "1.2"
    aspect_first: bool = False  # 1.3's other assignment rule
    size_multiple: int = 16  # 2.0: the grid of sizes
    batch_scale: int = 1  # multiplies every batch size; the trainer sets it to the mesh's number of data shards
    drop_last: bool = True  # False: the last batch of a bucket is filled up from its beginning
    allow_starving: bool = False  # train although some rows of the table get no batch
    frame_interval: int = 1  # take every n-th frame
    fps_max: float = 0.0  # 2.0: the interval that brings a clip down to this rate; 0 = use frame_interval
    transform: str = "resize_crop"  # center, rand_size_crop
    mask_ratios: Mapping[str, float] | None = None  # 1.1 and 1.2: a mask a sample
    mask_types: Mapping[str, float] | None = None  # 1.3: one condition a batch
    time_stride: int = 1  # pixel frames per latent frame, which x_mask counts in
    time_chunk_frames: int = 0  # frames that the VAE takes at a time (17 in 1.2)
    time_overlap_frames: int = 0  # frames of them that were in the chunk before too (1 in 1.3)
    num_threads: int = 0  # decoding threads a process; 0 = two a core, 32 at most
    num_workers: int = 0  # reading processes; threads are faster up to a few dozen cores
    prefetch_steps: int = 2
    max_bad_share: float = 0.02  # of the records read; over it the run stops


@dataclass(frozen=True)
class StepInfo:
    """What is known of a batch beside its arrays."""

    step: int
    epoch: int
    bucket: Bucket
    ids: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]  # (id, reason) of records that were replaced
    wait_seconds: float  # how long the caller stood idle


def make_loader(
    config: DataConfig,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
) -> "Loader":
    """The loader of one process, checked before anything is read: a starving bucket is an error with a table."""
    source = source or open_sources(config)
    plan = make_plan(config, source)
    plan.check(allow_starving=config.allow_starving)
    if process_index == 0 and plan.rejected():
        say(f"data: {plan.format_report().splitlines()[-1]}")
    for row in plan.report():
        if row["batch"] % process_count:
            raise UserError(
                f"data: a global batch of {row['batch']} ({row['resolution']}, {row['frames']} frames) cannot be shared "
                f"by {process_count} processes"
            )
    steps = StepSource(config, source, plan, process_index, process_count)
    return Loader(steps, start_step)


def open_sources(config: DataConfig) -> Source:
    specs = [config.source] if isinstance(config.source, str | os.PathLike) else list(config.source)
    if not specs:
        raise UserError("data.source is empty: name a folder of shards, a .csv, a .parquet, tfds:… or shapes:train")
    sources = [open_source(spec) for spec in specs]
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def make_plan(config: DataConfig, source: Source) -> Plan:
    """The plan of a data set; a source of latents keeps the shapes that it was encoded at."""
    if config.buckets:
        table = BucketTable(
            config.buckets, config.bucket_version, aspect_first=config.aspect_first, multiple=config.size_multiple
        )
    elif source.latents:
        table = None
    else:
        single = {f"{config.height}x{config.width}": {config.num_frames: (1.0, config.batch_size)}}
        table = BucketTable(single, area_tolerance=0.0)
    return Plan(
        source.shapes,
        table,
        seed=config.seed,
        intervals=frame_intervals(config, source.fps),
        batch_scale=config.batch_scale,
        drop_last=config.drop_last,
        exact_batch_size=config.batch_size if source.latents else None,
    )


def frame_intervals(config: DataConfig, fps: np.ndarray) -> np.ndarray:
    if not config.fps_max:
        return np.full(len(fps), config.frame_interval)
    return np.maximum(1, np.ceil(np.asarray(fps, np.float64) / config.fps_max)).astype(int)


class StepSource:
    """Element s is this process's share of step s: what Grain's threads or worker processes call."""

    def __init__(self, config: DataConfig, source: Source, plan: Plan, process_index: int, process_count: int):
        self.config, self.source, self.plan = config, source, plan
        self.process_index, self.process_count = process_index, process_count
        self.masks = MaskGenerator(config.mask_ratios) if config.mask_ratios else None
        self.buffers = BufferPool()
        self._pool = None

    def __len__(self) -> int:
        return UNBOUNDED

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}

    def __getitem__(self, step: int) -> dict:
        planned = self.plan.at(int(step))
        share = planned.size // self.process_count
        slots = range(self.process_index * share, (self.process_index + 1) * share)
        batch = RowsOfBatch(self.buffers, share)
        self._pool = self._pool or ThreadPoolExecutor(self.config.num_threads or min(32, 2 * (os.cpu_count() or 1)))
        jobs = [
            self._pool.submit(self._sample, planned, slot, partial(batch.row, row)) for row, slot in enumerate(slots)
        ]
        rows = [job.result() for job in jobs]
        bad = [item for row in rows for item in row.pop("bad")]
        if any("id" not in row for row in rows):
            return {"failed": True, "step": planned.step, "bad": bad}
        ids = [row.pop("id") for row in rows]
        return {"failed": False, "step": planned.step, "ids": ids, "bad": bad, "batch": batch.gathered(rows, ids)}

    def _sample(self, planned: PlannedStep, slot: int, place: Place) -> dict:
        """One row of the batch; a bad record is replaced by the next of its bucket, whoever reads it."""
        bad = []
        for attempt in range(min(ATTEMPTS, len(planned.order))):
            clip = planned.clip(slot, attempt)
            rng = random.Random(f"{self.config.seed}/{planned.step}/{slot}/{attempt}")
            name = f"#{clip}"  # all that is known of one that cannot even be parsed
            try:
                record = self.source.into(clip, place) if self.source.latents else self.source[clip]
                name = record["id"]
                load = self._latents if self.source.latents else self._pixels
                return load(record, planned, rng, place) | {"id": name, "bad": bad}
            except UserError:
                raise
            except Exception as error:  # whatever a broken file provokes: skipped, counted and named
                bad.append((name, f"{type(error).__name__}: {error}"))
        return {"bad": bad}

    def _pixels(self, record: dict, planned: PlannedStep, rng: random.Random, place: Place) -> dict:
        bucket, config = planned.bucket, self.config
        interval = int(frame_intervals(config, [record["fps"]])[0])
        indices = frame_indices(record["num_frames"], bucket.num_frames, interval, rng)
        size = (bucket.height, bucket.width)
        scale = scaled_size(config.transform, size)
        if "frames" in record:
            frames = record["frames"][indices]
            frames = resize(frames, scale(*frames.shape[1:3]))
        else:
            frames = read_frames(record.get("video") or media(record["path"]), indices=indices, size=scale)
        video = place("video", (*bucket.shape, 3), np.dtype(np.float32))
        normalize(crop(frames, config.transform, size, rng), video)
        frames_out = latent_frames(
            bucket.num_frames, time_stride=config.time_stride, time_chunk_frames=config.time_chunk_frames,
            time_overlap_frames=config.time_overlap_frames,
        )  # fmt: skip
        return {"video": video} | self._facts(record, planned, frames_out, interval, rng)

    def _latents(self, record: dict, planned: PlannedStep, rng: random.Random, place: Place) -> dict:
        arrays = {key: record[key] for key in ("latents", "text_emb", "text_mask", "y_vec") if key in record}
        return arrays | self._facts(record, planned, len(arrays["latents"]), 1, rng)

    def _facts(self, record, planned, num_latent_frames, interval, rng) -> dict:
        bucket = planned.bucket
        mask, noisy = self._mask(planned, num_latent_frames, rng)
        fps = IMAGE_FPS if bucket.num_frames == 1 else record["fps"] / interval
        return {
            "text": record["text"],
            "x_mask": mask,
            **noisy,
            "fps": np.float32(fps),
            "height": np.int32(bucket.height),
            "width": np.int32(bucket.width),
            "num_frames": np.int32(bucket.num_frames),
        }

    def _mask(self, planned: PlannedStep, frames: int, rng: random.Random) -> tuple[np.ndarray, dict]:
        """True for frames to generate; and, where a kind of data.mask_types says so, whether the given ones are noisy."""
        mask = np.ones(frames, bool)
        if self.masks:
            return self.masks(frames, rng), {}
        if not self.config.mask_types:
            return mask, {}
        shared = random.Random(f"{self.config.seed}/{planned.step}")  # one condition for the whole global batch
        kind = pick_mask_type(self.config.mask_types, shared)
        mask[condition_frames(kind, frames, shared)] = False
        if not any(name.endswith("_noisy") for name in self.config.mask_types):
            return mask, {}
        return mask, {"noisy": np.bool_(kind.endswith("_noisy") and not mask[0])}


class Loader:
    """Iterates over steps; `position` and `check_position` are what a checkpoint needs."""

    def __init__(self, steps: StepSource, start_step: int):
        self.config, self.plan, self.latents = steps.config, steps.plan, steps.source.latents
        self.plan_hash = self.plan.fingerprint()
        self.bad = Counter()  # id → times met
        self.read = 0
        self.wait_seconds = 0.0
        self._steps = steps
        self.seek(start_step)

    def seek(self, step: int) -> None:
        """The next batch is that of `step`; reading ahead begins with the first."""
        self.next_step, self._stream = step, None

    def __iter__(self):
        return self

    def __next__(self) -> tuple[dict, StepInfo]:
        began = time.perf_counter()
        self._stream = self._stream or _grain_stream(self._steps, self.next_step)
        element = next(self._stream)
        waited = time.perf_counter() - began
        self.wait_seconds += waited
        self._count(element)
        if element["failed"]:
            raise UserError(self._complaint(f"step {element['step']}: no readable record to put in place of bad ones"))
        planned = self.plan.at(element["step"])
        self.next_step = element["step"] + 1
        bad = tuple(map(tuple, element["bad"]))
        info = StepInfo(element["step"], planned.epoch, planned.bucket, tuple(element["ids"]), bad, waited)
        batch = element["batch"]
        if self.config.num_workers:  # what comes from a worker lies in shared memory that must not be held on to
            batch = {key: np.array(value) if key != "text" else value for key, value in batch.items()}
        return batch, info

    def position(self, step: int | None = None) -> dict:
        """The global cursor: enough for any number of processes and workers to go on after `step` steps."""
        return {"seed": self.config.seed, "step": self.next_step if step is None else step, "plan_hash": self.plan_hash}

    def check_position(self, position: Mapping) -> None:
        """Raises when a saved cursor means other clips than this loader would give."""
        if position["seed"] != self.config.seed:
            raise UserError(
                f"data.seed is {self.config.seed}, but the run to resume used {position['seed']}: its order of clips "
                "cannot be continued (use the same seed, or start a new run with init_from)"
            )
        if position["plan_hash"] != self.plan_hash:
            raise UserError(
                f"the data set, its buckets or batch sizes differ from those of the run to resume (plan {self.plan_hash}, "
                f"saved {position['plan_hash']}): its order of clips cannot be continued (restore them, or start a new run "
                "with init_from)"
            )

    def close(self) -> None:
        if hasattr(self._stream, "close"):
            self._stream.close()

    def _count(self, element: dict) -> None:
        self.read += len(element["bad"]) + len(element.get("ids", ()))
        for name, reason in element["bad"]:
            if name not in self.bad:
                say(f"data: skipped record {name}: {reason}")
            self.bad[name] += 1
        bad = sum(self.bad.values())
        if bad > self.config.max_bad_share * self.read and self.read >= min(200, len(self.plan.shapes)):
            raise UserError(self._complaint(f"{bad} of {self.read} records read were bad"))

    def _complaint(self, what: str) -> str:
        names = ", ".join(name for name, _ in self.bad.most_common(5))
        return f"data: {what} (data.max_bad_share is {self.config.max_bad_share:g}); among them: {names}"


def _grain_stream(steps: StepSource, start_step: int):
    import grain

    config = steps.config
    ahead = max(1, config.prefetch_steps)
    workers = config.num_workers
    data = grain.MapDataset.source(steps)[start_step:]
    per_worker = math.ceil(ahead / workers) if workers else ahead
    stream = data.to_iter_dataset(grain.ReadOptions(num_threads=per_worker, prefetch_buffer_size=per_worker))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its flags here; a program without absl has parsed none
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        stream = stream.mp_prefetch(options)
    return iter(stream)
