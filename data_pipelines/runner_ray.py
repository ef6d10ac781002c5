"""The Ray runner: the same stage classes as actors under Ray Data's map_batches, on one machine or a cluster.

A worker writes its own part file (parts.py) and sends back only counts, so pixels and rows never enter the object store
and a dead worker, driver or cluster loses no finished batch. A row that kills every worker becomes an error of that
row, within the same error budget as rows that fail.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines import files, parts
from data_pipelines.stage import Batch, Resources, Stage
from opensora_jax.common.errors import UserError

WAIT_SECONDS = 180
STARTS = 3  # of a cluster of our own
TRIES = 3  # of a batch that cannot be divided (a shard) and whose worker dies


class Worker:
    """A stage inside an actor. Ray restarts an actor that dies and gives it the same batch again, without end; so a
    worker notes what it is about to do, and whoever finds the note of a dead one goes on row by row to the culprit.
    """

    def __init__(self, stage: type[Stage], config: Any, folder: str, notes: str):
        self.stage, self.folder, self.notes = stage(config), folder, notes

    def __call__(self, batch: pa.Table) -> pa.Table:
        ids = batch["id"].to_pylist()
        note = files.join(self.notes, f"{files.digest(*ids)}.json")
        past = json.loads(files.read_bytes(note)) if files.exists(note) else None
        if past is None or self.stage.group:
            tries = (past or {}).get("tries", 0) + 1
            files.write_bytes(note, json.dumps({"tries": tries}).encode())
            done = parts.perform(self.stage, batch, self.folder) if tries <= TRIES else self.give_up(ids)
        else:
            done = self.carefully(batch, ids, note, past)
        files.remove(note)
        return pa.table({name: [value] for name, value in done.items()})

    def carefully(self, batch: pa.Table, ids: list[str], note: str, past: dict) -> dict:
        """Row by row; the row at which a worker died before is left out."""
        bad = [*past.get("bad", []), *([past["row"]] if "row" in past else [])]
        made: dict[str, list] = {}
        for k, name in enumerate(ids):
            files.write_bytes(note, json.dumps({"row": name, "bad": bad}).encode())
            out = self.failed([name]) if name in bad else self.stage(batch.slice(k, 1).to_pydict())
            for column, values in out.items():
                made.setdefault(column, []).extend(values)
        lost = parts.write(self.folder, self.stage.schema(), self.stage.key(), ids, made)
        return {"rows": len(ids), "errors": len(lost), "example": next(iter(lost.values()), "")}

    def give_up(self, ids: list[str]) -> dict:
        parts.write(self.folder, self.stage.schema(), self.stage.key(), ids, self.failed(ids))
        return {"rows": len(ids), "errors": len(ids), "example": DIED}

    def failed(self, ids: list[str]) -> Batch:
        empty = {name: [None] * len(ids) for name in self.stage.schema().names}
        return {**empty, self.stage.key(): ids, "error": [DIED] * len(ids)}


DIED = "its worker died, and again when it was alone"


def connect(address: str | None) -> None:
    try:
        import ray
    except ImportError as error:
        raise UserError('--runner=ray needs Ray: pip install "opensora-jax[ray]"') from error
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
        return
    # Logical CPUs: with fewer than about eight, Ray Data's own helpers and our actors can wait for each other for ever.
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                num_cpus=max(8, os.cpu_count() or 1),
                include_dashboard=False,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                **quiet,
            )
            return
        except Exception as error:  # Ray gives a node 30 s, which a busy machine may need more than once
            ray.shutdown()
            if not left:
                raise UserError(f"Ray does not start on this machine ({error}); --runner=local needs none") from error


def run(stage: type[Stage], config: Any, work: Iterable[pa.Table], folder: str, workers: int | None) -> Iterator[dict]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a block that Ray gives up leaves no part; the driver counts its rows as errors
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = [batch.combine_chunks() for batch in work]
    if not blocks:
        return
    wants = stage.wants(config)
    most = min(len(blocks), workers or fitting(wants, ray.cluster_resources()))
    watchdog = patience(stage, wants)
    done = ray.data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=(stage, config, folder, files.join(folder, f".run-{time.time_ns()}")),
        batch_size=None,  # one block is one batch: the parts are those of the local runner
        batch_format="pyarrow",
        num_cpus=wants.num_cpus,
        num_gpus=wants.num_gpus,
        compute=ActorPoolStrategy(min_size=1, max_size=most),
    )
    try:
        for counts in done.iter_rows():
            watchdog.cancel()
            watchdog = patience(stage, wants)
            yield counts
    finally:
        watchdog.cancel()


def patience(stage: type[Stage], wants: Resources) -> threading.Timer:
    """Ray waits in silence for resources that a cluster does not have; this says so."""
    worker = f"{stage.__name__} ({wants.num_cpus} CPU, {wants.num_gpus} GPU a worker)"
    text = f"no batch of {worker} has finished for {WAIT_SECONDS} s; does `ray status` show that much free?"
    timer = threading.Timer(WAIT_SECONDS, print, [text], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    return timer


def fitting(wants: Resources, cluster: dict[str, float]) -> int:
    """Most actors of a stage. On a cluster of our own the CPUs are logical, so the machine's cores count instead."""
    if wants.num_gpus:
        return max(1, int(cluster.get("GPU", 0) / wants.num_gpus))
    nodes = len([name for name in cluster if name.startswith("node:") and name != "node:__internal_head__"])
    cores = (os.cpu_count() or 1) if nodes <= 1 else cluster.get("CPU", 1)
    return min(wants.max_workers or 1 << 16, max(1, int(cores / wants.num_cpus)))
