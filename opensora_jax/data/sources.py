"""Where clips come from: shards, tables of files, TFDS, or the procedural shapes; all behind one small interface.

A source knows the shape and rate of every clip without opening it (`shapes`, `fps`: what bucketing needs) and gives
record `i` as a dict: `id, text, num_frames, fps, height, width` and one of `video` (bytes), `path`, `frames` or `latents`.

    FOLDER, FOLDER/*.array_record      shards of our records (records.py); also gs:// and s3://
    clips.csv, clips.parquet           path, text and, when known, num_frames, height, width, fps (else probed)
    tfds:FOLDER[?split=train]          a prepared TFDS data set with `video` and `text` features
    shapes:train[?count=4096&seed=0&size=64&num_frames=17&colours=red,orange&paint=any]
"""

import csv
import os
import re
from functools import cached_property
from typing import Protocol
from urllib.parse import parse_qsl

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.data import records, shapes
from opensora_jax.data.array_record_file import ArrayRecordFile
from opensora_jax.data.video_io import VideoError, probe, read_frames


class Source(Protocol):
    shapes: np.ndarray  # [N, 3] frames, height, width
    fps: np.ndarray  # [N]
    latents: bool  # records carry latents, not pixels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    # Where latents: `into(index, place)` is the record too, each large array written where `place(key, shape, dtype)` says.


def open_source(spec: str | os.PathLike) -> Source:
    """The source that a configuration string names; see the module's docstring for the forms."""
    spec = str(spec)
    name, _, query = spec.partition("?")
    if name.startswith("shapes:"):
        return ShapesSource(name.removeprefix("shapes:"), **_options(query, spec))
    if name.startswith("tfds:"):
        return TfdsSource(name.removeprefix("tfds:"), **dict(parse_qsl(query)))
    if name.endswith((".csv", ".parquet")):
        return TableSource(spec)
    return ShardSource(spec)


class JoinedSource:
    """Several sources one after the other: joint image and video training, or several data sets."""

    def __init__(self, sources: list[Source]):
        if len({source.latents for source in sources}) > 1:
            raise UserError("data.source: latents and pixels cannot be mixed in one run")
        self.sources = sources
        self.latents = sources[0].latents
        self.shapes = np.concatenate([source.shapes for source in sources])
        self.fps = np.concatenate([source.fps for source in sources])
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        source, index = self._locate(index)
        return source[index]

    def into(self, index: int, place) -> dict:
        source, index = self._locate(index)
        return source.into(index, place)

    def _locate(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[which], index - (int(self.ends[which - 1]) if which else 0)


class ShardSource:
    """ArrayRecord files of our records; remote files are copied to the cache once."""

    def __init__(self, spec: str):
        self.spec = spec
        self.files, self.counts, columns = [], [], {key: [] for key in records.INDEX}
        self.latents = False
        for path in _shard_paths(spec):
            index, payload = _shard_index(path)
            self.files.append(records.local_copy(path))
            self.counts.append(len(index["num_frames"]))
            self.latents = self.latents or "latents" in payload
            for key in records.INDEX:
                columns[key].extend(index[key])
        self.shapes = np.stack(
            [np.asarray(columns[key], np.int32) for key in ("num_frames", "height", "width")], axis=1
        )
        self.fps = np.asarray(columns["fps"], np.float32)
        self.ends = np.cumsum(self.counts)
        self._opened: dict[str, ArrayRecordFile | None] = {}

    @cached_property
    def _reader(self):
        from grain.sources import ArrayRecordDataSource

        return ArrayRecordDataSource([f"{file}[0:{count}]" for file, count in zip(self.files, self.counts)])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> dict:
        return records.decode_record(self._reader[index])

    def __getitems__(self, indices) -> list[dict]:
        return [records.decode_record(data) for data in self._reader.__getitems__(list(indices))]

    def into(self, index: int, place) -> dict:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        number = index - int(self.ends[shard] - self.counts[shard])
        file = self._file(self.files[shard])
        if file is None:
            return {key: _placed(key, value, place) for key, value in self[index].items()}
        if file.sizes[number] < records.WORTH_PIECES:
            return records.decode_record(file.read(number, 0, records.WORTH_PIECES))

        def take(key, dtype, shape, at):
            out = place(key, shape, dtype)
            file.read_into(number, at, out.reshape(-1).view(np.uint8))
            return out

        return records.decode_pieces(lambda at, count: file.read(number, at, count), take)

    def _file(self, path: str) -> ArrayRecordFile | None:
        """A shard to read parts of; none where others packed several records in a chunk, or compressed them."""
        if path not in self._opened:
            try:
                self._opened[path] = ArrayRecordFile(path)
            except ValueError:
                self._opened[path] = None
        return self._opened[path]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_reader"} | {"_opened": {}}


def _placed(key: str, value, place):
    if not isinstance(value, np.ndarray) or value.nbytes < records.WORTH_PIECES:
        return value
    out = place(key, value.shape, value.dtype)
    out[...] = value
    return out


def _shard_paths(spec: str) -> list[str]:
    from etils import epath

    path = epath.Path(spec)
    if "*" in path.name:
        found = sorted(str(p) for p in path.parent.glob(path.name) if str(p).endswith(records.SUFFIX))
    elif spec.endswith(records.SUFFIX):
        found = [spec] if path.exists() else []
    else:
        found = sorted(str(p) for p in path.glob(f"*{records.SUFFIX}")) if path.is_dir() else []
    if not found:
        what = "exists but holds no" if path.is_dir() else "does not exist or is no folder of"
        raise UserError(f"data.source: {spec} {what} *{records.SUFFIX} files (nor a .csv, .parquet, tfds: or shapes:)")
    return found


def _shard_index(path: str) -> tuple[dict, list[str]]:
    """Shapes and column names of a shard from its side file, or, for shards that others packed, from its records."""
    import json

    from etils import epath

    side = epath.Path(path.removesuffix(records.SUFFIX) + ".json")
    if side.exists():
        facts = json.loads(side.read_text())
        return facts["index"], facts["columns"]
    from grain.sources import ArrayRecordDataSource

    index, columns = {key: [] for key in records.INDEX}, set()
    for position, data in enumerate(ArrayRecordDataSource([records.local_copy(path)])):
        try:
            record = records.decode_record(data)
            for key in records.INDEX:
                index[key].append(record[key])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: record {position} is not one of ours ({error})") from None
        columns.update(record)
    return index, sorted(columns)


class TableSource:
    """A CSV or Parquet table of clips; paths are relative to the table. Columns that are missing are probed once."""

    latents = False

    def __init__(self, path: str):
        self.folder = os.path.dirname(path)
        rows = _read_table(path)
        self.paths, self.texts = [row["path"] for row in rows], [row["text"] for row in rows]
        facts = [self._facts(path, number, row) for number, row in enumerate(rows)]
        self.shapes = np.array([fact[:3] for fact in facts], np.int32).reshape(-1, 3)
        self.fps = np.array([fact[3] for fact in facts], np.float32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        frames, height, width = self.shapes[index].tolist()
        path = self._full(self.paths[index])
        facts = {"num_frames": frames, "height": height, "width": width, "fps": float(self.fps[index])}
        return {"id": self.paths[index], "text": self.texts[index], "path": path, **facts}

    def _full(self, path: str) -> str:
        return path if os.path.isabs(path) or "://" in path else os.path.join(self.folder, path)

    def _facts(self, table: str, number: int, row: dict) -> tuple:
        values = []
        for key in records.INDEX:
            text = row.get(key)
            if text in (None, "") or text != text:  # absent, empty or not a number
                values.append(None)
                continue
            try:
                values.append(float(text))
            except (TypeError, ValueError):
                raise UserError(f"{table}: row {number + 1}, column `{key}`: {text!r} is not a number") from None
        if None in values:
            try:
                info = probe(media(self._full(row["path"])))
            except VideoError:  # a shape of zeros fits no bucket: the report before training counts it as unreadable
                return (0, 0, 0, 0.0)
            found = (info.num_frames, info.height, info.width, info.fps)
            values = [have if value is None else value for value, have in zip(values, found)]
        return tuple(values)


def _read_table(path: str) -> list[dict]:
    from etils import epath

    if not epath.Path(path).exists():
        raise UserError(f"data.source: {path} does not exist")
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'opensora-jax[data]'") from None
        with epath.Path(path).open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    else:
        with epath.Path(path).open("r") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path}: has no rows; expected a header with path,text and one clip a row")
    for column in ("path", "text"):
        if column not in rows[0]:
            found = ", ".join(str(key) for key in rows[0])
            raise UserError(f"{path}: has no column `{column}`; its columns are {found}")
        for number, row in enumerate(rows):
            if not row[column]:
                raise UserError(f"{path}: row {number + 1} has an empty `{column}`")
    return rows


class TfdsSource:
    """A data set prepared by TensorFlow Datasets as array_record, read without TensorFlow."""

    latents = False

    def __init__(self, folder: str, *, split: str = "train", video: str = "video", text: str = "text", fps: str = "24"):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(folder)
            self._data = builder.as_data_source(split)
        except Exception as error:  # TFDS has a class of its own for every way in which a folder can be wrong
            what = f"data.source: tfds:{folder}?split={split} cannot be read"
            if isinstance(error, ImportError):  # its Video feature, for one, is built on TensorFlow
                raise UserError(f"{what} without TensorFlow ({error}): pip install tensorflow") from None
            raise UserError(f"{what}: {error}") from None
        features = builder.info.features
        for name in (video, text):
            if name not in features:
                raise UserError(
                    f"tfds:{folder} has no feature `{name}` (it has {', '.join(features)}); ?video=…&text=…"
                )
        self.name, self.video, self.text, self.rate = builder.name, video, text, float(fps)
        self.fps = np.full(len(self), self.rate, np.float32)
        self.shapes = self._shapes(features[video].shape)

    def _shapes(self, declared) -> np.ndarray:
        if len(declared) == 4 and None not in declared[:3]:
            return np.tile(np.asarray(declared[:3], np.int32), (len(self), 1))
        return np.array([self[index]["frames"].shape[:3] for index in range(len(self))], np.int32)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        example = self._data[index]
        frames, text = example[self.video], example[self.text]
        if isinstance(frames, bytes):
            frames = read_frames(frames)
        facts = dict(zip(("num_frames", "height", "width"), frames.shape[:3]))
        text = text.decode() if isinstance(text, bytes) else str(text)
        return {"id": f"{self.name}-{index}", "text": text, "frames": frames, "fps": self.rate, **facts}


class ShapesSource:
    """The procedural data set (shapes.py), drawn on demand."""

    latents = False

    def __init__(
        self,
        split="train",
        *,
        count=4096,
        seed=0,
        size=64,
        num_frames=17,
        colours=tuple(shapes.COLOURS),
        paint="named",
    ):
        if paint not in ("named", "any"):
            raise UserError(f"shapes: paint must be named or any, got {paint!r}")
        self.choices = shapes.scenes(split, colours)
        if not self.choices:
            raise UserError(f"shapes: split {split!r} holds no scene in {', '.join(colours)}")
        self.options = {"seed": seed, "size": size, "num_frames": num_frames, "paint": paint}
        self.shapes = np.tile(np.array([num_frames, size, size], np.int32), (count, 1))
        self.fps = np.full(count, 8, np.float32)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> dict:
        return shapes.make_record(index, choices=self.choices, **self.options)


def media(path: str) -> str | bytes:
    """What a decoder can open: the path of a local file, the bytes of a remote one."""
    if "://" not in path:
        return path
    from etils import epath

    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error})") from None


def _options(query: str, spec: str) -> dict:
    """The `?key=value` part of a shapes source."""
    known = ("count", "seed", "size", "num_frames", "colours", "paint")
    options = dict(parse_qsl(query))
    for key, value in options.items():
        if key not in known:
            raise UserError(f"data.source: {spec}: unknown option `{key}`; one of {', '.join(known)}")
        if key not in ("colours", "paint") and not re.fullmatch(r"\d+", value):
            raise UserError(f"data.source: {spec}: `{key}` must be a whole number, got {value!r}")
        options[key] = value if key == "paint" else tuple(value.split(",")) if key == "colours" else int(value)
    return options
