"""Weights on disk under our names: a folder with config.json and model.safetensors (several and an index above 5 GB).

Written tensor by tensor into a temporary name, so that a folder under its final name is always whole.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError

SHARD_BYTES = 5 * 10**9
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32"}
NAMES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
DTYPES = {short: name for name, short in NAMES.items()}


def numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]], arrays, metadata=None) -> None:
    """One file, streamed: `tensors` gives shape and dtype of each name in order, `arrays` yields (name, array) so, or
    (name, iterator of its parts along the first axes)."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = {key: str(value) for key, value in metadata.items()}
    for name, (shape, dtype) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for expected, (name, array) in zip(tensors, arrays, strict=True):
            assert expected == name, (expected, name)
            for part in array if isinstance(array, Iterator) else (array,):
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            assert file.tell() == 8 + len(head) + header[name]["data_offsets"][1], name
    partial.rename(path)


def write_folder(
    folder, specs: Mapping[str, tuple[tuple[int, ...], str]], arrays: Iterable, config: dict | None = None
):
    """Weights (and config.json) into a folder, sharded above SHARD_BYTES; `arrays` yields in the order of `specs`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict] = [{}]
    filled = 0
    for name, (shape, dtype) in specs.items():
        size = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = (shape, dtype)
        filled += size
    stream = iter(arrays)
    total = len(groups)
    file_of = {}
    for i, group in enumerate(groups):
        name = "model.safetensors" if total == 1 else f"model-{i + 1:05d}-of-{total:05d}.safetensors"
        write_safetensors(folder / name, group, (next(stream) for _ in range(len(group))))
        file_of |= dict.fromkeys(group, name)
    if total > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": file_of}, indent=1)
        )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_params(folder, flat: Mapping[str, np.ndarray], config: dict, dtype: str | None = None) -> None:
    """A flat tree {path: array} as a weights folder; floats are stored in `dtype` when one is given."""

    def kind(array):
        name = np.dtype(array.dtype).name
        return dtype if dtype and name in ("float32", "bfloat16", "float16", "float64") else name

    specs = {path: (tuple(array.shape), kind(array)) for path, array in flat.items()}
    arrays = ((path, np.asarray(array).astype(numpy_dtype(specs[path][1]))) for path, array in flat.items())
    write_folder(folder, specs, arrays, config)


def hollow(shape, dtype) -> np.ndarray:
    """An array of that shape without memory behind it."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Folder:
    """Reads a weights folder lazily: names and shapes at once, a tensor when it is asked for."""

    def __init__(self, folder):
        from safetensors import safe_open

        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{self.folder} holds no .safetensors file; it should be a folder written by convert or --export"
            )
        self._files = {}
        for path in files:
            try:
                handle = safe_open(path, framework="numpy")
            except Exception as error:
                raise UserError(
                    f"{path} is not a readable safetensors file ({error}); copy or convert it again"
                ) from None
            self._files |= dict.fromkeys(handle.keys(), handle)
        self.shapes = {name: tuple(h.get_slice(name).get_shape()) for name, h in self._files.items()}

    @property
    def config(self) -> dict:
        path = self.folder / "config.json"
        if not path.exists():
            raise UserError(f"{path} is missing; it names the architecture of the weights beside it")
        return json.loads(path.read_text())

    def dtype(self, name: str) -> np.dtype:
        return numpy_dtype(DTYPES[self._files[name].get_slice(name).get_dtype()])

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """The folder fills exactly these parameters."""
        missing = sorted(set(wanted) - set(self.shapes))
        extra = sorted(set(self.shapes) - set(wanted))
        wrong = [name for name in wanted if name in self.shapes and tuple(wanted[name]) != self.shapes[name]]
        for problem, names in (("lacks", missing), ("has unknown", extra), ("has other shapes for", wrong)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise UserError(
                    f"{self.folder} {problem} {', '.join(names[:5])}{more}; is its config.json the right one?"
                )
