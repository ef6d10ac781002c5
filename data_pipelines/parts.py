"""Part files: what a stage has finished, on disk. They are the checkpoint of both runners.

A part holds the rows made from one batch and, in its schema metadata, the ids of the rows that went in and the errors
among them. It appears under its final name in one step, so after kill -9 a batch is either finished or never happened,
and a run that resumes reads the ids and leaves those rows alone: also a run begun by one runner and ended by the other.
"""

import io
import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines import files, tables
from data_pipelines.stage import Batch, Stage


def perform(stage: Stage, batch: pa.Table, folder: str) -> dict:
    """Runs a stage on a batch and writes its part: the whole of what a worker does, under either runner."""
    ids = batch["id"].to_pylist()
    made = stage(batch.to_pydict())
    failed = write(folder, stage.schema(), stage.key(), ids, made)
    return {"rows": len(ids), "errors": len(failed), "example": next(iter(failed.values()), "")}


def write(folder: str, schema: pa.Schema, key: str, ids: list[str], made: Batch) -> dict[str, str]:
    problems = made.get("error", [None] * len(made[key]))
    failed = {name: problem for name, problem in zip(made[key], problems) if problem}
    kept = [k for k, problem in enumerate(problems) if not problem]
    table = pa.table(
        {field.name: pa.array([made[field.name][k] for k in kept], field.type) for field in schema}, schema=schema
    )
    note = {"done": json.dumps([name for name in ids if name not in failed]), "errors": json.dumps(failed)}
    tables.write_parquet(table, files.join(folder, f"part-{files.digest(*ids)}.parquet"), note)
    return failed


def read(folder: str, schema: pa.Schema, key: str) -> tuple[pa.Table, list[str], dict[str, str]]:
    """(rows, finished input ids, errors by id). An id that failed once and succeeded later is finished."""
    found = []
    for name in files.listing(folder, (".parquet",)) if files.exists(folder) else []:
        source = io.BytesIO(files.read_bytes(name)) if files.is_remote(name) else name
        with pq.ParquetFile(source) as part:
            note = part.schema_arrow.metadata
            found.append((part.read(), json.loads(note[b"done"]), json.loads(note[b"errors"])))
    rows, seen = [], set()
    for table, done, _ in found:
        again = seen.intersection(done)  # two drivers at work on one folder
        if again:
            table = table.filter(pc.invert(pc.is_in(table[key], pa.array(list(again), pa.string()))))
        seen.update(done)
        rows.append(table.replace_schema_metadata(None))
    errors = {k: v for _, _, failed in found for k, v in failed.items() if k not in seen}
    return pa.concat_tables(rows) if rows else schema.empty_table(), list(seen), errors


def batches(table: pa.Table, size: int, group: str | None) -> Iterable[pa.Table]:
    """Slices of a table; with `group`, all rows of equal value together."""
    if group is None:
        for start in range(0, table.num_rows, size):
            yield table.slice(start, size)
        return
    for value in pc.unique(table[group]).to_pylist():
        yield table.filter(pc.equal(table[group], pa.scalar(value)))
