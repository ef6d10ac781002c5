"""Local folders, s3:// and gs:// through one layer (fsspec), with writes that a kill -9 cannot leave half done.

A local file is written under a temporary name and renamed; an object store shows an object only when it is complete.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TABLE_SUFFIXES = (".parquet", ".csv")


def is_remote(path: str) -> bool:
    return "://" in str(path)


def join(folder: str, *names: str) -> str:
    return "/".join([str(folder).rstrip("/"), *names])


def absolute(path: str) -> str:
    return str(path) if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, inner = fsspec.core.url_to_fs(str(path))
    if is_remote(path):
        fs.invalidate_cache()  # other processes write to the same bucket
    return fs, inner


def exists(path: str) -> bool:
    fs, inner = system(path)
    return fs.exists(inner)


def is_folder(path: str) -> bool:
    fs, inner = system(path)
    return fs.isdir(inner)


def size(path: str) -> int:
    fs, inner = system(path)
    return int(fs.size(inner))


def make_folder(path: str) -> None:
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def listing(folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Every file below `folder` with one of the suffixes, sorted, as full addresses; hidden files are left out."""
    fs, inner = system(folder)
    scheme = str(folder).split("://")[0] + "://" if is_remote(folder) else ""
    found = [scheme + name.removeprefix(scheme) for name in fs.find(inner)]
    return sorted(
        name
        for name in found
        if not Path(name).name.startswith(".") and (not suffixes or Path(name).suffix.lower() in suffixes)
    )


def read_bytes(path: str) -> bytes:
    fs, inner = system(path)
    return fs.cat_file(inner)


def write_bytes(path: str, data: bytes) -> None:
    with replacing(path) as local, open(local, "wb") as handle:
        handle.write(data)


def remove(path: str) -> None:
    fs, inner = system(path)
    if fs.exists(inner):
        fs.rm(inner)


@contextlib.contextmanager
def fetched(path: str) -> Iterator[str]:
    """A local name of the file: itself, or a temporary copy of a remote object."""
    if not is_remote(path):
        yield str(path)
        return
    fs, inner = system(path)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, Path(inner).name)
        fs.get_file(inner, local)
        yield local


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary local name, same suffix; its content becomes `path` in one step when the block ends without error."""
    suffix = Path(str(path)).suffix
    if is_remote(path):
        fs, inner = system(path)
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "object" + suffix)
            yield local
            fs.put_file(local, inner)
        return
    make_folder(os.path.dirname(path))
    handle, local = tempfile.mkstemp(prefix=".partial-", suffix=suffix, dir=os.path.dirname(path))
    os.close(handle)
    try:
        yield local
        os.chmod(local, 0o644)
        os.replace(local, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(local)


def digest(*parts: object) -> str:
    """A stable 16-digit name for any printable values: ids of videos and clips, names of part files."""
    return hashlib.sha1("\0".join(map(str, parts)).encode()).hexdigest()[:16]
