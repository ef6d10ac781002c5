"""Tables in and out: a folder of videos, Parquet, or CSV in the columns of the original tools → rows with id and path.

`id` is a hash of the file's place below the input folder (or of its address when the input is a list), so that it stays
the same on another machine and between runs.
"""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from data_pipelines import files
from opensora_jax.common.errors import UserError

ORIGINAL_COLUMNS = ("path", "text", "num_frames", "width", "height", "aspect_ratio", "fps")
ORIGINAL_COLUMNS += ("aes", "flow", "ocr", "match", "cmotion")


def read_input(source: str) -> pa.Table:
    """The rows of `source`: a folder of videos, of Parquet files, of a run's results, a .parquet or a .csv."""
    source = result(files.absolute(source))
    if not files.exists(source):
        raise UserError(f"--input {source} does not exist")
    if not files.is_folder(source):
        return with_ids(read(source), source)
    found = files.listing(source, files.VIDEO_SUFFIXES + files.IMAGE_SUFFIXES)
    if found:
        return from_files(found, source)
    parts = files.listing(source, (".parquet",))
    if not parts:
        raise UserError(
            f"--input {source} holds no video and no Parquet file; looked for {', '.join(files.VIDEO_SUFFIXES)}"
        )
    return with_ids(pa.concat_tables([read(part) for part in parts], promote_options="default"), source)


def result(source: str) -> str:
    """The table of a run's --output, where also the tables of its steps lie; any other place is itself."""
    made = files.join(source, "table.parquet")
    return made if files.exists(files.join(source, "meta")) and files.exists(made) else source


def from_files(found: list[str], root: str) -> pa.Table:
    places = [name.removeprefix(root.rstrip("/") + "/") for name in found]
    texts = [sidecar(name) for name in found]
    columns = {"id": [files.digest(place) for place in places], "source": places, "path": found}
    if any(texts):
        columns["text"] = texts
    return pa.table(columns)


def sidecar(name: str) -> str | None:
    """The caption that lies beside a local video as NAME.txt, or as `caption` or `text` in NAME.json."""
    if files.is_remote(name):
        return None
    plain, structured = Path(name).with_suffix(".txt"), Path(name).with_suffix(".json")
    if plain.is_file():
        return plain.read_text().strip()
    if not structured.is_file():
        return None
    try:
        facts = json.loads(structured.read_text())
    except ValueError as error:
        raise UserError(f"{structured} is no JSON: {error}") from error
    text = (facts.get("caption") or facts.get("text")) if isinstance(facts, dict) else None
    return text.strip() if isinstance(text, str) else None


def read(path: str, columns: list[str] | None = None) -> pa.Table:
    if path.endswith(".csv"):
        options = pyarrow.csv.ConvertOptions(strings_can_be_null=True, include_columns=columns)
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        try:
            return pyarrow.csv.read_csv(
                io.BytesIO(files.read_bytes(path)), convert_options=options, parse_options=parse
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is not a readable CSV: {error}") from error
    if not path.endswith(".parquet"):
        raise UserError(f"{path}: tables are .parquet or .csv")
    try:
        if files.is_remote(path):
            return pq.read_table(io.BytesIO(files.read_bytes(path)), columns=columns)
        return pq.read_table(path, columns=columns)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def with_ids(table: pa.Table, source: str) -> pa.Table:
    """Adds `id` and `source` where missing; relative paths are taken from the table's folder."""
    if "path" not in table.column_names:
        raise UserError(f"{source} has no column path; it has {', '.join(table.column_names)}")
    given = [str(p) for p in table["path"].to_pylist()]
    root = os.path.dirname(source)
    full = [p if files.is_remote(p) or os.path.isabs(p) else files.join(root, p) for p in given]
    table = table.set_column(table.column_names.index("path"), "path", pa.array(full, pa.string()))
    if "source" not in table.column_names:
        table = table.append_column("source", pa.array(given, pa.string()))
    if "id" not in table.column_names:
        table = table.append_column("id", pa.array([files.digest(p) for p in given], pa.string()))
    else:
        table = table.set_column(table.column_names.index("id"), "id", table["id"].cast(pa.string()))
    if pc.count_distinct(table["id"]).as_py() != table.num_rows:
        raise UserError(f"{source} has rows with the same id: remove doubled paths first (data_pipelines.table dedup)")
    return table


def write_parquet(table: pa.Table, path: str, metadata: dict[str, str] | None = None) -> None:
    if metadata:
        table = table.replace_schema_metadata(metadata)
    with files.replacing(path) as local:
        pq.write_table(table, local, compression="zstd")


def write_csv(table: pa.Table, path: str, columns: list[str] | None = None) -> None:
    """CSV for the original tools: their columns first, those that exist; others only when named."""
    chosen = columns or [name for name in ORIGINAL_COLUMNS if name in table.column_names]
    unknown = [name for name in chosen if name not in table.column_names]
    if unknown:
        raise UserError(f"the table has no column {unknown[0]}; it has {', '.join(table.column_names)}")
    flat = [name for name in chosen if not pa.types.is_nested(table.schema.field(name).type)]
    with files.replacing(path) as local:
        pyarrow.csv.write_csv(table.select(flat), local)


def set_column(table: pa.Table, name: str, values) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def ordered(table: pa.Table) -> pa.Table:
    """The one order of finished tables: by source, then by place in the source."""
    keys = [name for name in ("source", "start_frame", "id") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in keys])


class Pieces:
    """A table of any length in pieces of bounded size: Parquet (a file or a folder of parts) or CSV, local or remote."""

    def __init__(self, source: str, rows: int = 1 << 18):
        source = result(files.absolute(source))
        if not files.exists(source):
            raise UserError(f"--input {source} does not exist")
        fs, inner = files.system(source)
        kind = "csv" if source.endswith(".csv") else "parquet"
        if files.is_folder(source):
            found = files.listing(source, (".parquet",)) or files.listing(source, (".csv",))
            if not found:
                raise UserError(f"--input {source} holds no .parquet and no .csv")
            kind = Path(found[0]).suffix[1:]
            inner = [files.system(name)[1] for name in found]
        self.rows = rows
        from pyarrow import dataset  # loads pandas where that is installed: a second

        try:
            self.data = dataset.dataset(inner, format=kind, filesystem=fs)
        except pa.ArrowInvalid as error:
            raise UserError(f"--input {source} is not a readable table: {error}") from error
        self.schema = self.data.schema

    def __call__(self, columns: list[str] | None = None):
        for batch in self.data.to_batches(
            columns=columns, batch_size=self.rows, batch_readahead=2, fragment_readahead=1
        ):
            if batch.num_rows:
                yield pa.Table.from_batches([batch])
