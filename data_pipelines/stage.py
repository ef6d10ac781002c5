"""What a stage is: a class `Stage(config)` whose call turns a batch of columns into a batch of columns.

A stage declares the columns it reads and writes and the resources it wants; it knows nothing of runners, so the same
class serves a loop on a laptop and a Ray cluster. Stages exchange paths and ids, never pixels. The stage called `flow`
is `STAGE` in data_pipelines/flow.py: the file system is the registry. A dotted name (`mylab.stages.blur`) works too.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa

from opensora_jax.common.errors import UserError

Batch = dict[str, list]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one worker of a stage asks of a machine. CPUs are fractions, so that many stages fit a small machine."""

    num_cpus: float = 0.5
    num_gpus: float = 0.0
    max_workers: int | None = None  # 1: the stage keeps state that threads cannot share


class Stage:
    """Rows in, rows out. Subclasses give `row` (one row) or `rows` (a batch); a row that fails becomes an error."""

    columns_in: ClassVar[tuple[str, ...]] = ()
    columns_out: ClassVar[dict[str, pa.DataType]] = {}
    resources: ClassVar[Resources] = Resources()
    batch_size: ClassVar[int] = 16
    makes_rows: ClassVar[bool] = False  # True: the rows out are new rows and name the row they came from in `parent`
    forgets: ClassVar[tuple[str, ...]] = ()  # columns of the parent that are untrue of the new rows
    scratch: ClassVar[tuple[str, ...]] = ()  # columns that `prepare` adds for the workers alone
    pace: ClassVar[tuple[str, ...]] = ("num_gpus",)  # options that change no result: a resumed run may change them
    group: ClassVar[str | None] = None  # a column whose equal values must stay in one batch (the shard of `pack`)

    @dataclasses.dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def inputs(cls, config: Any) -> tuple[str, ...]:
        """Columns read under this config; a stage whose options name columns says so here."""
        return cls.columns_in

    @classmethod
    def wants(cls, config: Any) -> Resources:
        """The resources of one worker under this config: a stage with an option `num_gpus` can be given one."""
        return dataclasses.replace(cls.resources, num_gpus=getattr(config, "num_gpus", cls.resources.num_gpus))

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises a UserError for what would fail every row (weights that are not there), before any step starts."""

    @classmethod
    def prepare(cls, table: pa.Table, config: Any) -> pa.Table:
        """A chance to add columns that need the whole table (`pack` numbers its shards). Runs once, on the driver."""
        return table

    @classmethod
    def finish(cls, table: pa.Table, config: Any) -> None:
        """Runs once on the driver when every row is done (`pack` writes its manifest)."""

    def row(self, row: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        raise NotImplementedError

    def rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        key = self.key()
        for row in rows:
            try:
                result = self.row(row)
            except UserError:
                raise  # the set-up is wrong, and so would be every other row
            except Exception as error:
                made.append({key: row["id"], "error": f"{type(error).__name__}: {error}"[:500]})
                continue
            results = result if isinstance(result, list) else [result]
            made.extend({key: row["id"], **item} for item in results)
        return made

    def __call__(self, batch: Batch) -> Batch:
        names = list(batch)
        rows = [dict(zip(names, values)) for values in zip(*batch.values())]
        made = self.rows(rows)
        wanted = [*dict.fromkeys(["id", self.key(), *self.columns_out]), "error"]
        return {name: [row.get(name) for row in made] for name in wanted}

    @classmethod
    def key(cls) -> str:
        """The column of the output that names the input row."""
        return "parent" if cls.makes_rows else "id"

    @classmethod
    def schema(cls) -> pa.Schema:
        names = dict.fromkeys(["id", cls.key()], pa.string()) | cls.columns_out
        return pa.schema([pa.field(name, kind) for name, kind in names.items()])


class TableStage(Stage):
    """A stage that must see all rows at once (filter, dedup): metadata only, so it runs on the driver, in Arrow."""

    def table(self, table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """Returns the new table and a report that becomes report.json and a few printed lines."""
        raise NotImplementedError


def find(name: str) -> type[Stage]:
    """The stage class called `name`."""
    module = name if "." in name else f"data_pipelines.{name}"
    try:
        known = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        known = False
    stage = getattr(importlib.import_module(module), "STAGE", None) if known else None
    if stage is None:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; stages are {', '.join(names())}"
        raise UserError(f"there is no stage called {name}{hint}")
    return stage


def names() -> list[str]:
    """Every stage of this folder, found by its STAGE line without importing heavy libraries."""
    from pathlib import Path

    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\nSTAGE = " in p.read_text())


def configure(stage: type[Stage], options: Mapping[str, Any]) -> Any:
    """Options → the stage's frozen Config; an unknown option is an error that names its nearest neighbour."""
    fields = {field.name: field for field in dataclasses.fields(stage.Config)}
    hints = typing.get_type_hints(stage.Config)
    values = {}
    for name, value in options.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(fields) or 'no options'}"
            raise UserError(f"{stage.__module__.split('.')[-1]} has no option {name}; {hint}")
        values[name] = convert(value, hints[name], f"{stage.__module__.split('.')[-1]}.{name}")
    missing = [
        n for n, f in fields.items() if n not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{stage.__module__.split('.')[-1]} needs --{missing[0]}")
    return stage.Config(**values)


def split_commas(text: str) -> Iterator[str]:
    """Commas outside brackets and quotes separate items."""
    depth, quote, start = 0, "", 0
    for k, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([":
            depth += 1
        elif letter in ")]":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:k]
            start = k + 1
    yield text[start:]


def convert(value: Any, kind: Any, what: str) -> Any:
    """A value from a config file or a command line as the annotated type."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None or value == "none" else convert(value, kinds[0], what)
    try:
        if origin is tuple:
            if isinstance(value, str):
                value = json.loads(value) if value.startswith("[") else [*filter(None, split_commas(value))]
            return tuple(convert(item, typing.get_args(kind)[0], what) for item in value)
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what} must be {getattr(kind, '__name__', kind)}, not {value!r}") from error
