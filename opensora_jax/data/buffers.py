"""Memory for batches that is used again once nobody looks at the old batch any more.

A batch of video is tens to hundreds of megabytes; taking fresh pages from the system for each costs as much time as
filling them. A block returns to its pool when the last array (or view of one, or device buffer aliasing it) is gone.
"""

import threading
from collections import defaultdict

import numpy as np

KEPT_PER_SIZE = 4


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
