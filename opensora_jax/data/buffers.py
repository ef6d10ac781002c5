"""Memory for batches that is used again once nobody looks at the old batch any more.

A batch of video is tens to hundreds of megabytes; taking fresh pages from the system for each costs as much time as
filling them. A block returns to its pool when the last array (or view of one, or device buffer aliasing it) is gone.
"""

import threading
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from opensora_jax.common.errors import UserError

KEPT_PER_SIZE = 4
Place = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]  # (key, shape, dtype) → memory for it


class BufferPool:
    """`empty` is np.empty out of recycled memory."""

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._lock:
            free = self._free[size]
            block = free.pop() if free else None
        if block is None:
            block = np.empty(size, np.uint8)
        return np.asarray(_Lease(self, block)).view(dtype).reshape(shape)

    def give_back(self, block: np.ndarray) -> None:
        with self._lock:
            if len(self._free[block.nbytes]) < KEPT_PER_SIZE:
                self._free[block.nbytes].append(block)

    def __reduce__(self):  # a worker process starts with a pool of its own
        return BufferPool, ()


class _Lease:
    """What all views of a block have for their base: it dies with the last of them."""

    def __init__(self, pool: BufferPool, block: np.ndarray):
        self.pool, self.block = pool, block
        self.__array_interface__ = block.__array_interface__

    def __del__(self):
        self.pool.give_back(self.block)


class RowsOfBatch:
    """A batch that many threads fill, a row each: large arrays are written where they will lie, the others gathered."""

    def __init__(self, pool: BufferPool, count: int):
        self.pool, self.count = pool, count
        self.placed: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def row(self, number: int, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        with self._lock:
            if key not in self.placed:
                self.placed[key] = self.pool.empty((self.count, *shape), dtype)
        whole = self.placed[key]
        if (whole.shape[1:], whole.dtype) != (tuple(shape), dtype):
            raise UserError(
                f"data: `{key}` is {list(shape)} {dtype} in one record and {list(whole.shape[1:])} {whole.dtype} in "
                "another of the same batch; encode them alike"
            )
        return whole[number]

    def gathered(self, rows: list[dict], ids: list[str]) -> dict:
        """The batch: {key: array, or list of texts}. All rows must have the same keys, or one would show old memory."""
        for name, row in zip(ids, rows):
            if odd := row.keys() ^ rows[0].keys():
                raise UserError(
                    f"data: of the records {ids[0]} and {name} only one has `{min(odd)}`; encode them alike"
                )
        batch = {}
        for key, first in rows[0].items():
            values = [row[key] for row in rows]
            batch[key] = (
                self.placed[key] if key in self.placed else values if isinstance(first, str) else np.stack(values)
            )
        return batch
