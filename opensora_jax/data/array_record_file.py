"""Reads parts of records straight out of an uncompressed ArrayRecord file, into the memory where they are wanted.

ArrayRecord's reader hands out whole records as bytes, which it copies and hashes several times: nothing beside decoding a
video, but most of the work with latents of megabytes (docs/performance.md, "Data"). Here the bytes are copied once,
from the page cache to their row of the batch, without Python's lock.

The layout is documented (google/riegeli: doc/riegeli_records_file_format.md, google/array_record: cpp/layout.proto).
A file is a row of chunks, each a header of 40 bytes and data; every 64 KiB a block header of 24 bytes interrupts whatever
lies there. One `preadv` scatters the pieces between them to their place and the block headers aside, where they tell
whether the pieces belong to the record. With `group_size:1,uncompressed` a chunk is one record as it was written.
Hashes are not computed here: `opensora_jax.data.inspect --verify` compares whole shards with their checksums.
"""

import os
import struct
from collections.abc import Iterator

import numpy as np

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
USABLE = BLOCK - BLOCK_HEADER
BLOCKS_AT_ONCE = 500  # of two pieces each; the system takes 1024 pieces
MAGIC = 0x71930E704FDAE05E  # in the postscript of every ArrayRecord file
SIMPLE, AS_WRITTEN = ord("r"), 0  # type of a chunk; its compression
NOWHERE = np.empty(0, np.uint64), np.empty((0, 3), "<u8")


class ArrayRecordFile:
    """One file in which every record is a chunk of its own, as it was written. ValueError for any other,
    OSError for one that is damaged.
    """

    def __init__(self, path: str):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  it is open as long as this is
        size = os.fstat(self._file.fileno()).st_size
        if size < BLOCK or size % BLOCK:
            raise ValueError(f"{path} is no ArrayRecord file")
        postscript = self._messages(size - BLOCK)[0]
        if postscript.get(2) != MAGIC:
            raise ValueError(f"{path} is no ArrayRecord file")
        _, *records = self._messages(postscript[1])
        if any(record[3] != 1 for record in records):
            raise ValueError(f"{path} has several records in a chunk")
        self._begins = [record[1] for record in records]
        self.sizes = [record.get(2, 0) for record in records]
        if records:
            self._data(self._begins[0])

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int, start: int, count: int) -> bytes:
        """`count` bytes of record `index` from `start` on, or as many as it has."""
        out = bytearray(max(0, min(count, self.sizes[index] - start)))
        self.read_into(index, start, out)
        return bytes(out)

    def read_into(self, index: int, start: int, out) -> None:
        """Fills `out`, any writable bytes, with those of record `index` from `start` on."""
        begin, size, out = self._begins[index], self.sizes[index], memoryview(out)
        if not 0 <= start <= start + len(out) <= size:
            raise ValueError(f"{self.path}: record {index} has {size} bytes, not {start + len(out)}")
        first = unbroken(begin) + CHUNK_HEADER + 2 + varint_length(size)  # behind its compression and its own size
        end = broken(first + size - 1) + 1
        for done in range(0, len(out), BLOCKS_AT_ONCE * USABLE):
            places, headers = self._scatter(first + start + done, out[done : done + BLOCKS_AT_ONCE * USABLE])
            if len(places) and ((headers[:, 1] != places - begin) | (headers[:, 2] != end - places)).any():
                raise OSError(f"{self.path}: record {index} is damaged")

    def _scatter(self, at: int, out: memoryview) -> tuple[np.ndarray, np.ndarray]:
        """Fills `out` from the byte `at`, block headers not counted; returns their places and what they hold."""
        began = broken(at)
        first = BLOCK - began % BLOCK
        if len(out) <= first:
            if os.preadv(self._file.fileno(), [out], began) != len(out):
                raise OSError(f"{self.path} ends too early")
            return NOWHERE
        count = -(-(len(out) - first) // USABLE)
        headers = np.empty((count, 3), "<u8")
        aside = memoryview(headers.view(np.uint8).reshape(-1))
        pieces = [out[:first]]
        for number in range(count):
            pieces.append(aside[number * BLOCK_HEADER : (number + 1) * BLOCK_HEADER])
            pieces.append(out[first + number * USABLE : first + (number + 1) * USABLE])
        if os.preadv(self._file.fileno(), pieces, began) != len(out) + len(aside):
            raise OSError(f"{self.path} ends too early")
        return began + first + BLOCK * np.arange(count, dtype=np.uint64), headers

    def _data(self, begin: int) -> tuple[int, bytearray]:
        """(number of records, data) of the chunk that begins there."""
        header = bytearray(CHUNK_HEADER)
        self._scatter(unbroken(begin), memoryview(header))
        _, length, _, kind, _ = struct.unpack("<5Q", header)
        plain = kind & 0xFF == SIMPLE and length < os.fstat(self._file.fileno()).st_size
        data = bytearray(length if plain else 0)
        self._scatter(unbroken(begin) + CHUNK_HEADER, memoryview(data))
        if not data or data[0] != AS_WRITTEN:
            raise ValueError(f"{self.path} has no uncompressed records at byte {begin}")
        return kind >> 8, data

    def _messages(self, begin: int) -> list[dict[int, int]]:
        """The records of a chunk of the index, which are protocol buffers, as {field: whole number}."""
        count, data = self._data(begin)
        numbers = varints(data, 1)
        next(numbers)  # bytes that the sizes take
        sizes = [next(numbers) for _ in range(count)]
        ends = np.cumsum(sizes) + len(data) - sum(sizes)
        return [message(data[end - size : end]) for size, end in zip(sizes, ends)]


def unbroken(place: int) -> int:
    """A place in the file, counted without block headers."""
    return place // BLOCK * USABLE + max(0, place % BLOCK - BLOCK_HEADER)


def broken(at: int) -> int:
    """The place in the file of the byte `at`, counted without block headers."""
    return at // USABLE * BLOCK + BLOCK_HEADER + at % USABLE


def varints(data: bytes, at: int = 0) -> Iterator[int]:
    """Whole numbers of 7 bits a byte, the lowest first; the last byte of each has no eighth bit."""
    value = shift = 0
    for byte in memoryview(data)[at:]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0


def varint_length(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def message(data: bytes) -> dict[int, int]:
    """The fields of a protocol buffer that are whole numbers; it stops at the first that is not."""
    found, numbers = {}, varints(data)
    for tag in numbers:
        if tag & 7:
            break
        found[tag >> 3] = next(numbers)
    return found
