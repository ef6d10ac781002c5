"""Curation at length: does memory stay flat over thousands of clips, and are ten million rows of metadata a minute's
work?

    python -m benchmarks.curation clips --count=10000      # probe → cut → flow, hash → filter → pack; OCR on 100 of them
    python -m benchmarks.curation rows --count=10000000    # filter, analysis, split; wants 2 minutes, 8 GiB

`clips` samples the resident memory of the process twice a second and fits a line to the second half of the run: the
slope, in MiB a thousand clips and stage, is what a leak would show. `rows` runs the three commands as a user does, each
in a process of its own, and reads their wall time and greatest memory from the kernel.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np


class Memory:
    """Resident memory of this process over time, in MiB."""

    def __init__(self):
        self.samples, self.done = [], threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self):
        while not self.done.wait(0.5):
            self.samples.append((time.monotonic(), resident()))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def resident() -> float:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * resource.getpagesize() / 2**20


def clips(count: int, folder: str) -> dict:
    import pyarrow as pa

    from data_pipelines import pipeline, tables
    from data_pipelines.pipeline import Options, Step
    from data_pipelines.stage import configure, find

    videos, work = os.path.join(folder, "videos"), os.path.join(folder, "work")
    make(videos, count)
    step = lambda label, stage=None, **o: Step(label, find(stage or label), configure(find(stage or label), o))
    steps = [
        step("probe"),
        step("usable", "filter", keep=("status == 'ok'",)),
        step("scene_cut", preset="ultrafast"),
        step("flow"),
        step("fingerprint"),
        step("dedup"),
        step("moving", "filter", keep=("flow >= 0.5",)),
        step("pack"),
    ]
    report, table = {}, tables.read_input(videos)
    for number in range(1, len(steps) + 1):  # one step more each time: the steps before are resumed, which costs little
        with Memory() as memory:
            began, spent = time.monotonic(), time.process_time()
            made = pipeline.run(steps[:number], table, Options(work, quiet=True))
            seconds, spent = time.monotonic() - began, time.process_time() - spent
        facts = {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(spent, 1),
            "clips_per_second": round(count / seconds, 1),
            "rows": made.num_rows,
            **slope(memory.samples, count),
        }
        report[steps[number - 1].label] = facts
        print(steps[number - 1].label, json.dumps(facts), flush=True)
    few = made.slice(0, 100)
    few = few.select(["id", "source", "path", "num_frames"]).replace_schema_metadata(None)
    began, spent = time.monotonic(), time.process_time()
    pipeline.run([step("ocr")], pa.table(few), Options(os.path.join(folder, "ocr"), quiet=True))
    seconds, spent = time.monotonic() - began, time.process_time() - spent
    report["ocr"] = {"rows": few.num_rows, "seconds": round(seconds, 1), "cpu_seconds": round(spent, 1)}
    report["ocr"] |= {"memory_mib": round(resident(), 1)}
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return report


def slope(samples, count: int) -> dict:
    """MiB a thousand clips over the second half of a step, when warm-up is over."""
    half = samples[len(samples) // 2 :]
    if len(half) < 6:
        return {"memory_mib": round(samples[-1][1] if samples else resident(), 1)}
    times, sizes = np.array(half).T
    clips_done = (times - samples[0][0]) / (samples[-1][0] - samples[0][0]) * count
    return {
        "memory_mib": round(sizes[-1], 1),
        "mib_per_1000_clips": round(float(np.polyfit(clips_done, sizes, 1)[0]) * 1000, 3),
    }


def make(folder: str, count: int) -> None:
    from data_pipelines import synthetic

    if os.path.isdir(folder) and len(os.listdir(folder)) >= count:
        return
    workers = os.cpu_count() or 1
    share = -(-count // workers)
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(synthetic.plain, folder, min(share, count - k), k) for k in range(0, count, share)]
        for job in jobs:
            job.result()


def rows(count: int, folder: str) -> dict:
    source = os.path.join(folder, f"rows-{count}.parquet")
    invent(source, count)
    base = [sys.executable, "-m"]
    kept = os.path.join(folder, "kept.parquet")
    commands = {
        "filter": [
            "data_pipelines.table",
            "filter",
            f"--input={source}",
            f"--output={kept}",
            "--keep=aes >= 5, flow > 1, num_frames >= 48",
        ],
        "analyze": ["data_pipelines.analyze", f"--input={source}", f"--output={folder}/report"],
        "split": [
            "data_pipelines.table",
            "split",
            f"--input={source}",
            f"--output={folder}/s.parquet",
            "--parts=train:0.98,val:0.02",
        ],
    }
    report = {"rows": count, "file_mib": os.path.getsize(source) / 2**20}
    for name, words in commands.items():
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*base, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report[name] = {
            "seconds": round(time.monotonic() - began, 2),
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
            "peak_gib_so_far": round(after.ru_maxrss / 2**20, 2),
        }
        print(name, json.dumps(report[name]), flush=True)
    for what in ("seconds", "cpu_seconds"):
        report[what] = sum(report[name][what] for name in commands)
    return report


def invent(path: str, count: int) -> None:
    """Metadata as a finished pipeline leaves it, captions included."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if os.path.exists(path):
        return
    rng, piece = np.random.default_rng(0), 1 << 18
    moves = np.array(["pan left", "pan right", "tilt up", "zoom in", "static", "undetermined"])
    writer = None
    for start in range(0, count, piece):
        n = min(piece, count - start)
        number = pa.array(np.arange(start, start + n))
        name = pc.cast(
            pa.array(np.arange(start, start + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)), pa.string()
        )
        glued = lambda *parts: pc.binary_join_element_wise(*parts, "")
        place = pc.cast(pa.array(rng.integers(0, 977, n)), pa.string())
        shape = rng.integers(0, 3, n)
        table = pa.table(
            {
                "id": name,
                "path": glued("/data/clips/", name, ".mp4"),
                "text": glued("A camera follows subject ", pc.cast(number, pa.string()), " through place ", place, "."),
                "num_frames": rng.integers(24, 400, n),
                "height": np.array([360, 720, 1080])[shape],
                "width": np.array([640, 1280, 1920])[shape],
                "fps": np.array([24.0, 25.0, 30.0])[rng.integers(0, 3, n)],
                "aes": rng.normal(5, 0.8, n),
                "flow": rng.exponential(6, n),
                "ocr": rng.poisson(0.4, n),
                "cmotion": moves[rng.integers(0, len(moves), n)],
            }
        )
        writer = writer or pq.ParquetWriter(path + ".tmp", table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()
    os.replace(path + ".tmp", path)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("what", choices=("clips", "rows"))
    flags.add_argument("--count", type=int, default=None)
    flags.add_argument("--folder", help="kept when given; a temporary one otherwise")
    args = flags.parse_args()
    work = {"clips": (clips, 10_000), "rows": (rows, 10_000_000)}
    measure, default = work[args.what]
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(args.count or default, args.folder or scratch), indent=1))


if __name__ == "__main__":
    main()
