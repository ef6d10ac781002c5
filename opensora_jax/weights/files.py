"""Checkpoints as users have them, opened lazily: names, shapes and dtypes at once, a tensor when it is asked for.

    safetensors: one file, or a folder with an index          pickles: .pth .pt .bin, one file or a folder with an index
    a Hugging Face or diffusers folder with its config.json    wrappers inside: state_dict, model, ema, module.

Pickles are opened with weights_only, so that a file cannot run code; they need torch, which nothing else here does.
"""

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.weights import layouts
from opensora_jax.weights.store import DTYPES, numpy_dtype

HEADER_LIMIT = 100 * 2**20
DAMAGED = "the safetensors header is damaged; download or copy the file again"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "params")
EMA = ("ema", "ema_state_dict", "ema_model")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]
    config: dict
    prefix: str = ""  # what was taken off before every name
    recipes: dict = field(default_factory=dict)  # how tensors were joined to the reference's, by name

    def without(self, prefix: str) -> "Checkpoint":
        """The same tensors, their names without a prefix that all of them have."""
        cut = lambda table: {name.removeprefix(prefix): value for name, value in table.items()}
        read = lambda name: self.read(prefix + name)
        return Checkpoint(self.path, cut(self.shapes), cut(self.dtypes), read, self.config, self.prefix + prefix)

    def joined(self, table: list[layouts.Join]) -> "Checkpoint":
        """The same tensors under the reference's names, where another publisher's layout has others."""
        joined = layouts.joined(self.shapes, table)
        shapes = joined.shapes
        dtypes = {name: self.dtypes[joined.origin(name)] for name in shapes}
        read = lambda name: joined.read(self.read, name)
        return Checkpoint(self.path, shapes, dtypes, read, self.config, self.prefix, joined.recipes)


def open_checkpoint(path, *, ema: bool = False) -> Checkpoint:
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a checkpoint file, a folder with one, or a Hub id (org/name[/file])"
        )
    found = _open_folder(path, ema) if path.is_dir() else _open_file(path, _config_beside(path), ema)
    if not found.shapes:
        raise UserError(f"{path} holds no tensors")
    return _without_prefix(found)


def _without_prefix(found: Checkpoint) -> Checkpoint:
    """`module.` is what PyTorch's data-parallel wrappers put before every name."""
    names = list(found.shapes)
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in names):
            return found.without(prefix)
    return found


def _open_folder(folder: Path, ema: bool) -> Checkpoint:
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if ema and (beside := next((f for s in SUFFIXES if (f := folder / f"ema{s}").exists()), None)):
        return _open_file(beside, config, False)
    own = [file for file in folder.iterdir() if file.suffix in SUFFIXES and file.stem != "ema"]
    if (folder / "model").is_dir() and not own:  # Open-Sora's training: model/ beside ema.pt or ema.safetensors
        return _open_folder(folder / "model", ema)
    indices = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    if indices:
        table = _read_json(indices[0]).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{indices[0]} has no weight_map; it is not an index of shards")
        if away := next((name for name in table.values() if Path(name).name != name), None):
            raise UserError(f"{indices[0]} names {away}, which is not in its folder")
        files = sorted({folder / name for name in table.values()})
        return _joined(folder, files, config, ema, set(table))
    for pattern in (f"*{suffix}" for suffix in SUFFIXES):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return _open_file(files[0], config, ema)
        if files and pattern == "*.safetensors":
            return _joined(folder, files, config, ema, None)
        if files:
            raise UserError(f"{folder} holds {', '.join(f.name for f in files[:5])}: name the one that you mean")
    parts = sorted(p.name for p in folder.iterdir() if (p / "config.json").exists())
    hint = f"; convert its parts one by one: {', '.join(parts)}" if parts else ""
    raise UserError(f"{folder} holds no .safetensors, .pth, .pt or .bin file{hint}")


def _joined(folder: Path, files: list[Path], config: dict, ema: bool, expected: set[str] | None) -> Checkpoint:
    owners: dict[str, Checkpoint] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing; the index of {folder} names it")
        part = _open_file(file, {}, ema)
        for name in part.shapes:
            if name in owners:
                raise UserError(
                    f"{name} is in two files of {folder}: {owners[name].path.name} and {file.name}; name the one to read"
                )
            owners[name] = part
    if expected is not None and (lost := expected - set(owners)):
        raise UserError(f"the index of {folder} names {len(lost)} tensors that no shard holds, e.g. {sorted(lost)[0]}")
    shapes = {name: part.shapes[name] for name, part in owners.items()}
    dtypes = {name: part.dtypes[name] for name, part in owners.items()}
    return Checkpoint(folder, shapes, dtypes, lambda name: owners[name].read(name), config)


def _open_file(path: Path, config: dict, ema: bool) -> Checkpoint:
    if path.suffix == ".safetensors":
        if ema:
            raise UserError(f"{path} has no EMA weights; name the file that holds them, or leave --ema out")
        return _open_safetensors(path, config)
    if path.suffix in PICKLES:
        return _open_pickle(path, config, ema)
    raise UserError(
        f"{path}: {path.suffix or 'a file without a suffix'} is no checkpoint; known: .safetensors, {', '.join(PICKLES)}"
    )


def _open_safetensors(path: Path, config: dict) -> Checkpoint:
    """The header is checked here, whatever a reader would make of it: length, names, dtypes, extent."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length < 2 or length > min(HEADER_LIMIT, size - 8):
            raise UserError(
                f"{path} is not a safetensors file, or it is cut off: its header claims {length:,} bytes of {size:,}"
            )
        text = file.read(length)
    base = 8 + length
    entries = _header(text, path)
    shapes, dtypes, spans = {}, {}, {}
    for name, entry in entries.items():
        if entry.get("dtype") not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry.get('dtype')}, which is not supported")
        shapes[name], dtypes[name] = _whole_numbers(entry.get("shape")), DTYPES[entry["dtype"]]
        spans[name] = _whole_numbers(entry.get("data_offsets"), 2)
        if shapes[name] is None or spans[name] is None:
            raise UserError(f"{path}: {DAMAGED}")
        begin, end = spans[name]
        if end - begin != prod(shapes[name]) * numpy_dtype(dtypes[name]).itemsize or base + end > size:
            raise UserError(f"{path}: {name} does not fit the file ({size:,} bytes); it is cut off or damaged")
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            raise UserError(f"{path}: {name} overlaps another tensor or leaves a gap; the file is damaged")
        reached = end
    if base + reached != size:
        raise UserError(f"{path}: {size - base - reached:,} bytes belong to no tensor; the file is damaged")

    def read(name: str) -> np.ndarray:
        begin, end = spans[name]
        with path.open("rb") as file:
            file.seek(base + begin)
            data = np.fromfile(file, np.uint8, end - begin)
        return data.view(numpy_dtype(dtypes[name])).reshape(shapes[name])

    return Checkpoint(path, shapes, dtypes, read, config)


def _header(text: bytes, path: Path) -> dict[str, dict]:
    """Name → dtype, shape and offsets, each name once."""

    def unique(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise UserError(f"{path}: {twice[0]} is there twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        if all(isinstance(entry, dict) for entry in header.values()):
            return header
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: {DAMAGED}")


def _whole_numbers(value, count: int | None = None) -> tuple[int, ...] | None:
    """A list of numbers of things; anything else is nothing."""
    fine = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    return tuple(value) if fine and count in (None, len(value)) else None


def _open_pickle(path: Path, config: dict, ema: bool) -> Checkpoint:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch pickle: pip install 'opensora-jax[convert]' to read it (safetensors need nothing)"
        ) from None
    try:  # what was saved before PyTorch 1.6 is no zip file, and cannot be mapped
        mapped = zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds Python objects that could run code, which is refused"
        else:
            reason = "it is damaged or no PyTorch checkpoint"
        raise UserError(f"{path} cannot be opened: {reason}") from None
    items = _unwrapped(loaded, path, ema).items()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} is sparse, or claims more numbers than the file holds; it is not read")

    def read(name: str) -> np.ndarray:
        value = tensors[name].detach().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return value.numpy()

    return Checkpoint(path, shapes, dtypes, read, config)


def _unwrapped(loaded, path: Path, ema: bool) -> dict:
    """The state dict inside what training scripts save around it."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    if ema:
        chosen = next((key for key in EMA if isinstance(loaded.get(key), Mapping)), None)
        if chosen is None:
            raise UserError(f"{path} has no EMA weights (looked for {', '.join(EMA)}); leave --ema out")
        return dict(loaded[chosen])
    for _ in range(4):  # a pickle may even hold itself
        inner = next((loaded[key] for key in (*WRAPPERS, *EMA) if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return dict(loaded)


def _config_beside(path: Path) -> dict:
    beside = path.parent / "config.json"
    return _read_json(beside) if beside.exists() else {}


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a table")
    return value
