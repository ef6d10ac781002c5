"""Shard records: one msgpack map a clip, in ArrayRecord files that can be read at random.

A record holds `id, text, num_frames, fps, height, width`, then `video` (mp4 bytes) or `latents` ([T, H, W, C]) with
`text_emb` [L, D], `text_mask` [L] and, for Open-Sora 2.0, `y_vec` [D]; anything else goes under `meta`. A folder of shards has one side file a shard
(its length, checksum and the shapes of its clips: what bucketing needs without opening a record) and one manifest.json.
Folders may be local, gs:// or s3://.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError

REQUIRED = {"id": str, "text": str, "num_frames": int, "fps": float, "height": int, "width": int}
PAYLOADS = ("video", "latents")
OPTIONAL = ("text_emb", "text_mask", "y_vec", "meta")
INDEX = ("num_frames", "height", "width", "fps")
OPTIONS = "group_size:1,uncompressed"  # payloads are compressed already; a group of one makes random reads cheap
SUFFIX = ".array_record"
MANIFEST = "manifest.json"
ARRAY = 1  # msgpack extension code of an array: its dtype and shape, then its bytes
BYTES, LARGE = b"\xc6", b"\xc9"  # how msgpack begins bytes and extensions of 64 KiB and more
PIECE = 1 << 12  # bytes fetched at a time while looking for the large parts of a record
WORTH_PIECES = 1 << 16


def encode_record(record: dict) -> bytes:
    """A record as bytes; a missing or misspelt field is an error that names it."""
    import msgpack

    check_record(record)
    return msgpack.packb(record, default=_pack_array, use_bin_type=True)


def decode_record(data: bytes) -> dict:
    """The record; arrays are read-only views into its bytes, not copies."""
    if len(data) < WORTH_PIECES:
        return _whole(data)
    view = memoryview(data)
    take = lambda key, dtype, shape, at: np.frombuffer(view, dtype, math.prod(shape), at).reshape(shape)
    return decode_pieces(lambda at, count: view[at : at + count], take)


def decode_pieces(fetch, take) -> dict:
    """A record of which only the small parts need be at hand: `fetch(at, count)` gives bytes of it, and
    `take(key, dtype, shape, at)` what to keep of a large array whose own bytes begin at `at`.
    """
    import msgpack

    record = {}
    try:
        values = _Values(fetch)
        for _ in range(values.map_length()):
            key = values.next()
            kind = values.ahead(1)
            if kind == BYTES:
                size, at = struct.unpack(">xI", values.ahead(5))[0], values.at + 5
                record[key] = bytes(fetch(at, size))
                if len(record[key]) < size:
                    raise ValueError("it ends too early")
                values.jump(at + size)
            elif kind == LARGE:
                size, code = struct.unpack(">xIb", values.ahead(6))
                at = values.at + 6
                dtype, shape, head = _array_head(code, values.ahead(6 + 256)[6:])
                if head + math.prod(shape) * dtype.itemsize != size:
                    raise ValueError(f"{key} is not as long as its shape says")
                record[key] = take(key, dtype, shape, at + head)
                values.jump(at + size)
            else:
                record[key] = values.next()
    except (ValueError, TypeError, IndexError, struct.error, msgpack.UnpackException) as error:
        raise ValueError(f"not a shard record: {error}") from None
    return record


def _whole(data: bytes) -> dict:
    import msgpack

    try:
        record = msgpack.unpackb(data, ext_hook=_unpack_array)
    except (ValueError, TypeError, IndexError, struct.error, msgpack.UnpackException) as error:
        raise ValueError(f"not a shard record: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("not a shard record: no map at its top")
    return record


class _Values:
    """msgpack's values one after another, out of bytes that are fetched as they are needed."""

    def __init__(self, fetch):
        self.fetch = fetch
        self.jump(0)

    @property
    def at(self) -> int:
        return self.begin + self.unpacker.tell()

    def jump(self, at: int) -> None:
        import msgpack

        self.begin, self.window = at, b""
        self.unpacker = msgpack.Unpacker(ext_hook=_unpack_array, max_buffer_size=0, read_size=PIECE)

    def _feed(self, count: int = PIECE) -> None:
        more = bytes(self.fetch(self.begin + len(self.window), count))
        self.window += more
        self.unpacker.feed(more)

    def ahead(self, count: int) -> bytes:
        start = self.unpacker.tell()
        if start + count > len(self.window):
            self._feed()
        return self.window[start : start + count]

    def map_length(self) -> int:
        self._feed()
        return self.unpacker.read_map_header()

    def next(self):
        import msgpack

        while True:
            had = len(self.window)
            try:
                return self.unpacker.unpack()
            except msgpack.OutOfData:
                self._feed(max(PIECE, 15 * had))
                if len(self.window) == had:
                    raise ValueError("it ends too early") from None


def check_record(record: dict) -> None:
    name = f"record {record.get('id')!r}"
    for key, kind in REQUIRED.items():
        value = record.get(key)
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or isinstance(value, bool):
            raise UserError(f"{name}: `{key}` must be {kind.__name__}, got {value!r}")
    if sum(key in record for key in PAYLOADS) != 1:
        raise UserError(f"{name}: needs either `video` (mp4 bytes) or `latents` ([T, H, W, C])")
    if unknown := set(record) - set(REQUIRED) - set(PAYLOADS) - set(OPTIONAL):
        raise UserError(f"{name}: unknown field {sorted(unknown)}; further facts go under `meta`")


def _pack_array(value):
    import msgpack

    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a record cannot hold a {type(value).__name__}")
    head = msgpack.packb([value.dtype.name, list(value.shape)])
    head = bytes([len(head)]) + head
    return msgpack.ExtType(ARRAY, head + np.ascontiguousarray(value).tobytes())


def _unpack_array(code, data):
    dtype, shape, length = _array_head(code, data)
    return np.frombuffer(data, dtype, offset=length).reshape(shape)


def _array_head(code: int, data: bytes) -> tuple[np.dtype, list[int], int]:
    """What is written before the bytes of an array: its dtype, its shape; and how long that is."""
    import msgpack

    if code != ARRAY:
        raise ValueError(f"unknown extension {code}")
    length = 1 + data[0]
    dtype, shape = msgpack.unpackb(data[1:length])
    return dtype_of(dtype), shape, length


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":  # numpy has none of its own
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class ShardWriter:
    """Writes records into `folder/PREFIX-00000.array_record`, …, each under a temporary name until it is complete.

    A finished shard is never written again: `records_done` tells a restarted job how many records to pass over, so that
    with the same input an interrupted job ends with the same files as an unbroken one. Processes that write at the same
    time take different prefixes; one of them calls `write_manifest` when all are done.
    """

    def __init__(self, folder, *, records_per_shard: int = 1024, prefix: str = "clips"):
        from etils import epath

        self.folder = epath.Path(folder)
        self.records_per_shard = records_per_shard
        self.prefix = prefix
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write shards into {folder}: {error.strerror or error}") from None
        self.shards_done = 0
        self.records_done = 0
        while (side := self._side(self.shards_done)).exists():
            self.records_done += json.loads(side.read_text())["records"]
            self.shards_done += 1
        self._records, self._writer, self._scratch = [], None, None

    def write(self, record: dict) -> None:
        data = encode_record(record)
        if self._writer is None:
            self._open()
        self._writer.write(data)
        self._records.append({key: record[key] for key in INDEX})
        self._columns = sorted(record)
        if len(self._records) == self.records_per_shard:
            self._finish()

    def close(self) -> None:
        if self._writer is not None:
            self._finish()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        elif self._writer is not None:  # what was begun is dropped: only complete shards carry their name
            self._writer.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _side(self, shard: int):
        return self.folder / f"{self.prefix}-{shard:05d}.json"

    def _open(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._scratch = tempfile.mkdtemp(prefix=".writing-", dir=None if _remote(self.folder) else str(self.folder))
        self._file = os.path.join(self._scratch, f"{self.prefix}-{self.shards_done:05d}{SUFFIX}")
        self._writer = ArrayRecordWriter(self._file, OPTIONS)

    def _finish(self) -> None:
        self._writer.close()
        side = {
            "records": len(self._records),
            "bytes": os.path.getsize(self._file),
            "sha256": checksum(self._file),
            "columns": self._columns,
            "index": {key: [record[key] for record in self._records] for key in INDEX},
        }
        target = self.folder / os.path.basename(self._file)
        if _remote(self.folder):
            target.write_bytes(Path(self._file).read_bytes())  # object stores show a file only once it is complete
        else:
            os.replace(self._file, target)
        _write_whole(self._side(self.shards_done), json.dumps(side))
        shutil.rmtree(self._scratch, ignore_errors=True)
        self.records_done += len(self._records)
        self.shards_done += 1
        self._records, self._writer = [], None


def write_manifest(folder, **facts) -> dict:
    """Lists every finished shard of the folder with its length and checksum, and the `facts` its readers need."""
    from etils import epath

    folder = epath.Path(folder)
    shards = []
    for path in sorted(str(p) for p in folder.glob(f"*{SUFFIX}")):
        side = json.loads(epath.Path(path.removesuffix(SUFFIX) + ".json").read_text())
        shards.append({"file": os.path.basename(path)} | {k: v for k, v in side.items() if k != "index"})
    manifest = {
        "format": "opensora_jax records 1",
        "records": sum(shard["records"] for shard in shards),
        "columns": sorted({column for shard in shards for column in shard["columns"]}),
        **facts,
        "shards": shards,
    }
    _write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def read_manifest(folder) -> dict:
    """The manifest, or {} for a folder without one."""
    from etils import epath

    path = epath.Path(folder) / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


def verify_folder(folder) -> list[str]:
    """Names of shards whose bytes are not those that the manifest recorded."""
    manifest = read_manifest(folder)
    if not manifest:
        raise UserError(f"{folder} has no {MANIFEST} to check against")
    wrong = []
    for shard in manifest["shards"]:
        path = local_copy(os.path.join(str(folder), shard["file"]))
        if not os.path.exists(path) or checksum(path) != shard["sha256"]:
            wrong.append(shard["file"])
    return wrong


def checksum(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_copy(path) -> str:
    """The path itself when local, else a copy in the cache folder, fetched once (ArrayRecord seeks; buckets do not)."""
    if not _remote(path):
        return str(path)
    from etils import epath

    remote = epath.Path(path)
    size = remote.stat().length
    cache = Path(os.environ.get("OPENSORA_JAX_CACHE", Path.home() / ".cache" / "opensora_jax")) / "shards"
    target = cache / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}-{size}-{remote.name}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{target}.{os.getpid()}")
        with remote.open("rb") as source, open(partial, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)
        os.replace(partial, target)
    return str(target)


def _remote(path) -> bool:
    return "://" in str(path)


def _write_whole(path, text: str) -> None:
    """All or nothing: a reader never sees half a file."""
    if _remote(path):
        path.write_text(text)
        return
    partial = f"{path}.{os.getpid()}.tmp"
    with open(partial, "w") as file:
        file.write(text)
    os.replace(partial, str(path))
