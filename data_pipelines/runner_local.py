"""The local runner: a loop over batches and a pool of threads (PyAV, OpenCV and onnxruntime release the GIL).

It must stay a loop and never grow scheduling: what one machine cannot do is Ray's work.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import pyarrow as pa

from data_pipelines import parts
from data_pipelines.stage import Stage


def run(stage: type[Stage], config: Any, work: Iterable[pa.Table], folder: str, workers: int | None) -> Iterator[dict]:
    """Yields the counts of every batch as it is finished."""
    workers = workers or os.cpu_count() or 1
    workers = min(workers, stage.resources.max_workers or workers)
    worker = stage(config)
    work = iter(work)
    pool = ThreadPoolExecutor(workers)
    try:
        running = {pool.submit(parts.perform, worker, batch, folder) for batch in itertools.islice(work, 2 * workers)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {
                pool.submit(parts.perform, worker, batch, folder) for batch in itertools.islice(work, len(finished))
            }
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
