"""Runs steps one after another over a table: resumes, joins their columns, counts errors, writes what a user reads.

OUTPUT/
  meta/00_probe/…        part files of each step and step.json (its settings); Parquet that any tool opens
  clips/ …               files that a step makes, under its label
  rejected/NN_step.parquet   rows that failed in a step, with the reason
  report.json            rows in and out of each step, what each filter removed
  table.parquet, table.csv   the result
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import files, parts, runner_local, tables
from data_pipelines.stage import Stage, TableStage
from opensora_jax.common.errors import UserError
from opensora_jax.common.progress import duration

FEW = 10  # errors that never stop a run: a share of a handful says nothing


@dataclasses.dataclass(frozen=True)
class Step:
    label: str
    stage: type[Stage]
    config: Any


@dataclasses.dataclass(frozen=True)
class Options:
    output: str
    runner: str = "local"
    ray_address: str | None = None
    workers: int | None = None
    batch_size: int | None = None
    max_error_share: float = 0.1
    retry_errors: bool = False
    quiet: bool = False


def run(steps: Sequence[Step], table: pa.Table, options: Options) -> pa.Table:
    """The finished table. Everything finished before is kept; a changed setting of a finished step is an error."""
    given, output = options.output.rstrip("/"), files.absolute(options.output)
    options = dataclasses.replace(options, output=output)
    for step in steps:
        step.stage.check(step.config)
    if options.runner == "ray":
        from data_pipelines import runner_ray

        runner_ray.connect(options.ray_address)
    chain, report = "", []
    for number, step in enumerate(steps):
        chain = files.digest(chain, step.label, step.stage.__module__, settings(step))
        folder = files.join(output, "meta", f"{number:02d}_{step.label}")
        claim(folder, step, chain)
        began, before = time.monotonic(), table.num_rows
        perform = table_step if issubclass(step.stage, TableStage) else map_step
        table, note = perform(placed(step, output), number, table, folder, options)
        report.append({"step": step.label, "rows_in": before, "rows_out": table.num_rows, **note})
        if not options.quiet:
            took = duration(time.monotonic() - began)
            print(f"{step.label}: {before:,} → {table.num_rows:,} rows, {took}", file=sys.stderr)
    table = tables.ordered(table)
    tables.write_parquet(table, files.join(output, "table.parquet"))
    tables.write_csv(table, files.join(output, "table.csv"))
    files.write_bytes(files.join(output, "report.json"), json.dumps(report, indent=1).encode())
    if not options.quiet:
        rejected = sum(note.get("errors", 0) for note in report)
        failed = f"; {rejected:,} failed, the reasons are in rejected/" if rejected else ""
        print(f"{table.num_rows:,} rows in {given}/table.parquet{failed}", file=sys.stderr)
    return table


def placed(step: Step, output: str) -> Step:
    """Fills in `folder`, where a step that makes files puts them, unless the user chose one."""
    if getattr(step.config, "folder", None) == "":
        return dataclasses.replace(step, config=dataclasses.replace(step.config, folder=files.join(output, step.label)))
    return step


def claim(folder: str, step: Step, chain: str) -> None:
    """The settings a step ran with lie beside its parts; other settings on the same output would mix two data sets."""
    note = files.join(folder, "step.json")
    if files.exists(note):
        old = json.loads(files.read_bytes(note))
        if old["chain"] != chain:
            changed = [k for k, v in settings(step).items() if json.loads(json.dumps(v)) != old["config"].get(k)]
            what = f"{step.label}.{changed[0]}" if changed else "an earlier step"
            raise UserError(
                f"{folder} was made with another setting of {what}: choose a new --output or remove {folder}"
            )
        return
    text = json.dumps({"stage": step.stage.__module__, "config": settings(step), "chain": chain}, indent=1)
    files.write_bytes(note, text.encode())


def settings(step: Step) -> dict[str, Any]:
    """The options that decide what a step gives."""
    return {k: v for k, v in dataclasses.asdict(step.config).items() if k not in step.stage.pace}


def need(step: Step, table: pa.Table) -> list[str]:
    columns = list(dict.fromkeys(["id", *step.stage.inputs(step.config)]))
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(
            f"{step.label} needs the column {missing[0]}, which no earlier step and not the input gives; "
            f"there are {', '.join(table.column_names)}"
        )
    return columns


def map_step(step: Step, number: int, table: pa.Table, folder: str, options: Options) -> tuple[pa.Table, dict]:
    stage = step.stage
    table = stage.prepare(table, step.config)
    columns = need(step, table)
    schema, key = stage.schema(), stage.key()
    _, done, errors = parts.read(folder, schema, key)
    settled = done if options.retry_errors else [*done, *errors]
    known = pc.is_in(table["id"], pa.array(settled, pa.string()))
    chosen = [*columns, stage.group] if stage.group and stage.group not in columns else columns
    todo = table.select(chosen).filter(pc.invert(known))
    size = max(options.batch_size or stage.batch_size, todo.num_rows // 20_000)
    work = parts.batches(todo, size, stage.group)
    if options.runner == "ray":
        from data_pipelines import runner_ray as runner
    else:
        runner = runner_local
    finished = runner.run(stage, step.config, work, folder, options.workers) if todo.num_rows else iter(())
    watch(step.label, finished, todo.num_rows, options)
    made, done, errors = parts.read(folder, schema, key)
    errors |= dict.fromkeys(set(todo["id"].to_pylist()) - set(done) - errors.keys(), "its worker died")
    errors = reject(table, errors, files.join(options.output, "rejected", f"{number:02d}_{step.label}.parquet"))
    budget(step.label, len(errors), table.num_rows, next(iter(errors.values()), ""), options)
    table = joined(stage, table, made)
    stage.finish(table, step.config)
    return table, {"errors": len(errors)}


def watch(label: str, finished, total: int, options: Options) -> None:
    """Counts, prints a line every few seconds, and stops early when too much fails."""
    rows = wrong = 0
    began = said = time.monotonic()
    example = ""
    for counts in finished:
        rows, wrong, example = rows + counts["rows"], wrong + counts["errors"], example or counts["example"]
        if wrong < rows:
            budget(label, wrong, max(rows, total // 10), example, options)
        now = time.monotonic()
        if now - said > 5 and not options.quiet:
            left = (total - rows) * (now - began) / max(rows, 1)
            print(f"{label}: {rows:,}/{total:,} rows, {wrong:,} errors, {duration(left)} left", file=sys.stderr)
            said = now


def budget(label: str, wrong: int, rows: int, example: str, options: Options) -> None:
    if (wrong > FEW and wrong > options.max_error_share * rows) or (wrong == rows and wrong):
        share = f"--max_error_share={options.max_error_share}"
        raise UserError(f"{label}: {wrong} of {rows} rows failed, which is over {share}; one of them: {example}")


def reject(table: pa.Table, errors: dict[str, str], path: str) -> dict[str, str]:
    """Writes the failed rows of this table with their reasons; errors of rows no longer in the input are forgotten."""
    lost = table.filter(pc.is_in(table["id"], pa.array(list(errors), pa.string())))
    if lost.num_rows:
        reasons = pa.array([errors[name] for name in lost["id"].to_pylist()], pa.string())
        keep = [name for name in ("id", "source", "path") if name in lost.column_names]
        tables.write_parquet(lost.select(keep).append_column("error", reasons), path)
    else:
        files.remove(path)
    return {name: errors[name] for name in lost["id"].to_pylist()}


def joined(stage: type[Stage], table: pa.Table, made: pa.Table) -> pa.Table:
    """The step's columns beside those there were. New rows inherit what the step did not measure anew."""
    if stage.makes_rows:
        places = pc.index_in(made["parent"], table["id"])
        made, places = made.filter(pc.is_valid(places)), places.filter(pc.is_valid(places))
        kept = [n for n in table.column_names if n not in made.column_names and n not in stage.forgets]
        inherited = table.select(kept).take(places)
        for name in kept:
            made = made.append_column(name, inherited[name])
        return tables.ordered(made)
    places = pc.index_in(table["id"], made["id"])
    table, places = table.filter(pc.is_valid(places)), places.filter(pc.is_valid(places))
    made = made.take(places)
    for name in stage.columns_out:
        table = tables.set_column(table, name, made[name])
    return table.drop_columns([name for name in stage.scratch if name in table.column_names])


def table_step(step: Step, number: int, table: pa.Table, folder: str, options: Options) -> tuple[pa.Table, dict]:
    """Whole-table steps are remembered by a digest of what they read."""
    columns = need(step, table)
    digest = hashlib.sha1()
    for batch in table.select(columns).combine_chunks().to_batches():
        digest.update(batch.serialize())
    mark, path = digest.hexdigest(), files.join(folder, "rows.parquet")
    note = files.join(folder, "report.json")
    if files.exists(path) and files.exists(note):
        old, report = tables.read(path), json.loads(files.read_bytes(note))
        if (old.schema.metadata or {}).get(b"digest", b"").decode() == mark:
            return rebuilt(table, old.replace_schema_metadata(None)), report
    result, report = step.stage(step.config).table(table)
    added = [n for n in result.column_names if n not in table.column_names]
    files.write_bytes(note, json.dumps(report, indent=1).encode())
    tables.write_parquet(result.select(["id", *added]), path, {"digest": mark})
    for line in report.get("lines", []) if not options.quiet else []:
        print(f"  {line}", file=sys.stderr)
    return result, report


def rebuilt(table: pa.Table, kept: pa.Table) -> pa.Table:
    """A remembered whole-table step applied again: the kept ids in their order, and the columns it added."""
    table = table.take(pc.index_in(kept["id"], table["id"]))
    for name in kept.column_names[1:]:
        table = table.append_column(name, kept[name])
    return table
