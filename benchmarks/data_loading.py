"""Loading speed: our loader on mp4 and latent shards, against a torch DataLoader with the same decoder on the same files.

    python -m benchmarks.data_loading [--torch_python=PYTHON_WITH_TORCH] [--clips=96] [--size=256] [--rounds=2]

Prints a row a set-up: clips/s and MB/s of what reaches the caller, CPU time a clip, seconds to the first batch, and the
share of time that a trainer which needs 20 ms a step would wait. Latents are measured against raw reads of the same
warm file: `readinto` of 4 MB pieces at random, with as many threads as the loader has, into

- fresh memory a batch: np.empty, what a plain loader does;
- recycled batches: eight that take turns, what no loader can beat that keeps a few batches;
- one buffer a thread, over and over: it stays in the processor's cache, where no batch could be used.
"""

import argparse
import contextlib
import csv
import itertools
import json
import multiprocessing
import operator
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

STEP_SECONDS = 0.02
WARM_UP = 8  # batches, after which recycled memory has been touched
RAW = ("fresh", "recycled", "hot")  # memory that raw reads go to
MP4_SETUPS = ((1, 0), (2, 0), (4, 0), (2, 1), (1, 2))  # threads, workers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=2, help="of everything; the best counts, as others use the machine"
    )
    parser.add_argument("--latents", action="store_true", help="only latents and the overhead of a batch")
    parser.add_argument("--torch_python", help="an interpreter with torch and PyAV to compare with")
    parser.add_argument("--torch_side", help=argparse.SUPPRESS)  # the other half of this file, run by that interpreter
    return parser.parse_args()


def texture(rng, frames: int, size: int) -> np.ndarray:
    """Something that moves and does not compress to nothing."""
    field = rng.integers(0, 255, (size // 8 + frames, size // 8 + frames, 3), np.uint8)
    field = np.kron(field, np.ones((8, 8, 1), np.uint8))
    return np.stack([field[4 * i : 4 * i + size, 2 * i : 2 * i + size] for i in range(frames)])


def write_clips(folder: Path, args) -> None:
    from opensora_jax.data.records import ShardWriter
    from opensora_jax.data.video_io import encode_video

    rng = np.random.default_rng(0)
    facts = {"text": "moving texture", "num_frames": args.frames, "fps": 24.0, "height": args.size, "width": args.size}
    shapes = {"latents": (8, 64, 64, 64), "tiny": (5, 4, 4, 4)}  # 4 MB in half precision; next to nothing
    writers = {name: ShardWriter(folder / name) for name in ("mp4", *shapes)}
    rows = []
    for index in range(args.clips):
        facts["id"] = f"{index:05d}"
        data = encode_video(texture(rng, args.frames, args.size), 24)
        (folder / f"{index:05d}.mp4").write_bytes(data)
        rows.append((f"{index:05d}.mp4", facts["text"], args.frames, args.size, args.size, 24))
        writers["mp4"].write(facts | {"video": data})
        for name, shape in shapes.items():
            latents = rng.integers(0, 1 << 15, shape, np.uint16).view(np.float16)
            writers[name].write(facts | {"latents": latents})
    for writer in writers.values():
        writer.close()
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "num_frames", "height", "width", "fps"), *rows])


def timed(batches, count: int, size_of) -> dict:
    """After some to warm up, consumes `count` batches as fast as they come, then more at the pace of a trainer."""
    began = time.perf_counter()
    first = next(batches)
    startup = time.perf_counter() - began
    clips, size = size_of(first)
    for _ in range(WARM_UP):
        next(batches)
    began, spent = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    seconds, spent = time.perf_counter() - began, cpu_seconds() - spent
    waited = 0.0
    paced = min(count, 20)
    for _ in range(paced):
        time.sleep(STEP_SECONDS)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return {
        "clips_per_second": count * clips / seconds,
        "mb_per_second": count * size / seconds / 1e6,
        "startup_seconds": startup,
        "wait_share": waited / (waited + paced * STEP_SECONDS),
        "milliseconds_per_batch": 1e3 * seconds / count,
        "cpu_milliseconds_per_clip": 1e3 * spent / (count * clips),
    }


def cpu_seconds() -> float:
    """Spent so far by this process and by the workers it runs: what a busy machine cannot distort."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            total += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return total


def ours(source, args, *, threads: int = 0, workers: int = 0) -> dict:
    from opensora_jax.data.loader import DataConfig, make_loader

    config = DataConfig(
        source=str(source), batch_size=args.batch, num_frames=args.frames, height=args.size, width=args.size,
        num_threads=threads, num_workers=workers,
    )  # fmt: skip
    began = time.perf_counter()
    loader = make_loader(config)
    size_of = lambda batch: (len(batch["text"]), batch.get("video", batch.get("latents")).nbytes)
    row = timed((batch for batch, _ in loader), args.epochs * args.clips // args.batch, size_of)
    row["startup_seconds"] = time.perf_counter() - began if row["startup_seconds"] is None else row["startup_seconds"]
    loader.close()
    return row


def torch_side(folder: Path, args) -> None:
    """A plain torch DataLoader over the same files with the same decoder; one JSON line a set-up."""
    import torch

    from opensora_jax.data.video_io import read_frames

    class Clips(torch.utils.data.Dataset):
        def __init__(self):
            with open(folder / "clips.csv") as file:
                self.rows = list(csv.DictReader(file))

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            frames = read_frames(folder / self.rows[index]["path"], num=args.frames)
            return torch.from_numpy(frames).float().div_(127.5).sub_(1), self.rows[index]["text"]

    torch.set_num_threads(1)
    for workers in (0, 1, 2, 4):
        loader = torch.utils.data.DataLoader(
            Clips(), args.batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )

        def endless(loader=loader):
            while True:
                yield from loader

        size_of = lambda batch: (len(batch[1]), batch[0].numel() * 4)
        row = timed(endless(), args.epochs * args.clips // args.batch, size_of)
        print(json.dumps({"name": f"torch DataLoader, {workers} workers"} | row), flush=True)


def raw_read(folder: Path, args, *, memory: str, threads: int) -> dict:
    """Plain reads of the latent shard from the page cache, a batch at a time, into the memory that is asked for."""
    path, piece = next((folder / "latents").glob("*.array_record")), 8 * 64 * 64 * 64 * 2
    rng, pieces = np.random.default_rng(0), path.stat().st_size // piece
    file = os.open(path, os.O_RDONLY)
    recycled = [np.ones((args.batch, piece), np.uint8) for _ in range(8)]
    hot = threading.local()

    def read(out) -> None:
        if out is None:
            if not hasattr(hot, "out"):
                hot.out = np.ones(piece, np.uint8)
            out = hot.out
        os.preadv(file, [out], int(rng.integers(pieces)) * piece)

    def batches():
        for number in itertools.count():
            fresh = np.empty((args.batch, piece), np.uint8) if memory == "fresh" else None
            rows = {"fresh": fresh, "recycled": recycled[number % 8], "hot": [None] * args.batch}[memory]
            list(pool.map(read, rows))
            yield rows

    with ThreadPoolExecutor(threads) as pool:
        row = timed(batches(), args.epochs * args.clips // args.batch, lambda _: (args.batch, args.batch * piece))
    os.close(file)
    return row


def show(name: str, row: dict) -> None:
    print(
        f"{name:34s} {row['clips_per_second']:8.1f} clips/s {row['mb_per_second']:8.0f} MB/s  "
        f"{row['milliseconds_per_batch']:7.2f} ms a batch  {row['cpu_milliseconds_per_clip']:7.3f} CPU ms a clip  "
        f"first {row['startup_seconds']:5.2f} s  "
        f"waiting {row['wait_share']:4.0%} of 20 ms steps",
        flush=True,
    )


def one_round(folder: Path, args) -> dict[str, dict]:
    """Every set-up once, by name."""
    rows = {}
    for name, source in () if args.latents else (("mp4 shards", folder / "mp4"), ("mp4 files", folder / "clips.csv")):
        for threads, workers in MP4_SETUPS:
            row = ours(source, args, threads=threads, workers=workers)
            rows[f"{name}, {threads} threads, {workers} workers"] = row
    if args.torch_python and not args.latents:
        sizes = [f"--{key}={getattr(args, key)}" for key in ("clips", "frames", "size", "batch", "epochs")]
        command = [args.torch_python, "-m", "benchmarks.data_loading", f"--torch_side={folder}", *sizes]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        for row in map(json.loads, lines):
            rows[row.pop("name")] = row
    for threads in (1, 2, 4):
        rows[f"latents of 4 MB, {threads} threads"] = ours(folder / "latents", args, threads=threads)
        for memory in RAW:
            rows[f"raw read, {memory}, {threads} threads"] = raw_read(folder, args, memory=memory, threads=threads)
    rows["records of next to nothing"] = ours(folder / "tiny", args, threads=2)
    return rows


def best(rounds: list[dict[str, dict]], start: str, key: str, choose=max) -> float:
    return choose(row[key] for rows in rounds for name, row in rows.items() if name.startswith(start))


def ratio(rounds: list[dict[str, dict]], title: str, ours: str, theirs: str, key: str) -> None:
    speed = best(rounds, ours, key) / best(rounds, theirs, key)
    frugal = (best(rounds, name, "cpu_milliseconds_per_clip", min) for name in (theirs, ours))
    print(f"{title}: {speed:.2f} of the speed, {operator.truediv(*frugal):.2f} of the clips for the same CPU time")


def main() -> None:
    args = arguments()
    if args.torch_side:
        torch_side(Path(args.torch_side), args)
        return
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        write_clips(Path(temporary), args)
        shape = f"{args.clips} clips of {args.frames} x {args.size} x {args.size}, batch {args.batch}"
        print(f"{os.cpu_count()} cores, {shape}, {args.rounds} rounds; the best round of each set-up:")
        for number in range(args.rounds):
            rounds.append(one_round(Path(temporary), args))
            print(f"round {number + 1} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    for name in rounds[0]:
        show(name, max((rows[name] for rows in rounds), key=lambda row: row["clips_per_second"]))
    for memory in RAW:
        ratio(rounds, f"latents / raw read, {memory}", "latents", f"raw read, {memory}", "mb_per_second")
    nothing = [rows["records of next to nothing"] for rows in rounds]
    overhead, spent = (min(row[k] for row in nothing) for k in ("milliseconds_per_batch", "cpu_milliseconds_per_clip"))
    print(
        f"overhead of a batch of {args.batch} records of next to nothing: {overhead:.2f} ms, CPU {spent * args.batch:.2f}"
    )
    if args.torch_python and not args.latents:
        ratio(rounds, "ours / torch, each at its best", "mp4", "torch", "clips_per_second")


if __name__ == "__main__":
    sys.exit(main())
