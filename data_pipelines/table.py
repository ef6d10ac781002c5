"""Operations on whole data sets, one command: what the originals spread over datautil, csvutil and split.

    python -m data_pipelines.table VERB --input=A[,B …] --output=FILE [options]

  info                          rows, columns and what is missing
  convert                       Parquet ⇄ CSV; --columns=… chooses and orders; --original keeps the originals' columns
  filter                        --keep="aes >= 5,num_frames >= 48"; says what each condition removed
  merge                         rows of all inputs; columns that one lacks are empty
  join                          columns of the later inputs beside the first, matched --on=id
  subtract, intersect           rows of the first that are (not) in the second, matched --on
  dedup                         the first row of each value of --on=path
  sort                          --by=aes [--descending]
  shuffle, head, sample         --seed=0, --rows=1000
  shard                         --parts=8: FILE_000 … FILE_007, in order
  split                         --parts=train:0.98,val:0.02 by a hash of id, so that growing data keep their side
  bucket                        at most --rows of each (height, width, frames) group, as the originals' split
  root                          --root=/new makes paths below --old absolute; --relative takes --root away

info, filter and split read the table in pieces and write as they go: any number of rows in bounded memory.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from data_pipelines import files, tables
from data_pipelines.filter import Tally
from opensora_jax.common.errors import UserError, guarded


class Sink:
    """A table written piece by piece under a temporary name."""

    def __init__(self, path: str):
        self.path, self.rows = path, 0
        if not path.endswith(files.TABLE_SUFFIXES):
            raise UserError(f"--output {path}: tables are .parquet or .csv")
        self.replacing = files.replacing(path)
        self.local = self.replacing.__enter__()
        self.writer = None

    def add(self, piece: pa.Table) -> None:
        if self.writer is None:
            csv = self.path.endswith(".csv")
            make = pyarrow.csv.CSVWriter if csv else lambda p, s: pq.ParquetWriter(p, s, compression="zstd")
            self.writer = make(self.local, piece.schema)
        self.writer.write_table(piece)
        self.rows += piece.num_rows

    def close(self, schema: pa.Schema) -> None:
        if self.writer is None:
            self.add(schema.empty_table())
        self.writer.close()
        self.replacing.__exit__(None, None, None)


def columns_of(schema: pa.Schema, args) -> list[str]:
    names = [c for c in args.columns.split(",") if c]
    if args.original:
        names = [c for c in tables.ORIGINAL_COLUMNS if c in schema.names]
    missing = [c for c in names if c not in schema.names]
    if missing:
        raise UserError(f"the table has no column {missing[0]}; it has {', '.join(schema.names)}")
    return names


def info(pieces: list[tables.Pieces], args) -> None:
    for source, name in zip(pieces, args.input):
        rows, missing = 0, dict.fromkeys(source.schema.names, 0)
        for piece in source():
            rows += piece.num_rows
            for column in missing:
                missing[column] += piece[column].null_count
        print(f"{name}: {rows} rows")
        for column, count in missing.items():
            print(f"  {column}: {source.schema.field(column).type}" + (f", {count} missing" if count else ""))


def filtered(pieces: list[tables.Pieces], args) -> None:
    if not args.keep:
        raise UserError("filter needs --keep=CONDITION[,CONDITION …]")
    tally, sink = Tally(tuple(part.strip() for part in split_conditions(args.keep))), Sink(args.output)
    for piece in pieces[0]():
        sink.add(piece.filter(tally.add(piece)))
    sink.close(pieces[0].schema)
    print("\n".join([*tally.lines(), f"{tally.kept} of {tally.rows} rows kept"]))


def split_conditions(text: str) -> Iterator[str]:
    """Commas outside brackets and quotes separate conditions."""
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


def parted(pieces: list[tables.Pieces], args) -> None:
    """Train, validation and so on, by a hash of the id: a row never changes sides when rows are added."""
    try:
        shares = {name: float(share) for name, share in (part.split(":") for part in args.parts.split(","))}
    except ValueError as error:
        raise UserError("split needs --parts=train:0.98,val:0.02") from error
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"the shares of --parts add up to {sum(shares.values())}, not 1")
    stem, dot, suffix = args.output.rpartition(".")
    sinks = {name: Sink(f"{stem}_{name}{dot}{suffix}") for name in shares}
    edges = np.cumsum(list(shares.values()))[:-1]
    for piece in pieces[0]():
        side = np.searchsorted(edges, uniform(piece["id"], args.seed), side="right")
        for number, sink in enumerate(sinks.values()):
            sink.add(piece.filter(pa.array(side == number)))
    for name, sink in sinks.items():
        sink.close(pieces[0].schema)
        print(f"{name}: {sink.rows} rows in {sink.path}")


def uniform(ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each id: FNV-1a over its UTF-8 bytes, mixed (splitmix64), all ids at once."""
    lengths = np.zeros(len(ids), np.int64)
    state = np.full(len(ids), (0xCBF29CE484222325 + seed) & 0xFFFFFFFFFFFFFFFF, np.uint64)
    flat = ids.cast(pa.large_binary()).combine_chunks()
    flat = flat.chunk(0) if isinstance(flat, pa.ChunkedArray) else flat
    offsets = np.frombuffer(flat.buffers()[1], np.int64)[flat.offset : flat.offset + len(flat) + 1]
    data = np.frombuffer(flat.buffers()[2], np.uint8) if flat.buffers()[2] else np.zeros(1, np.uint8)
    lengths = np.diff(offsets)
    for k in range(int(lengths.max(initial=0))):
        live = lengths > k
        letter = data[np.where(live, offsets[:-1] + k, 0)].astype(np.uint64)
        state = np.where(live, (state ^ letter) * np.uint64(0x100000001B3), state)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


def whole(pieces: list[tables.Pieces]) -> list[pa.Table]:
    return [
        pa.concat_tables(list(source())) if source.data.count_rows() else source.schema.empty_table()
        for source in pieces
    ]


def need(found: list, count: int, verb: str) -> None:
    if len(found) < count:
        raise UserError(f"{verb} needs {count} inputs: --input=A,B")


def joined(found: list[pa.Table], args) -> pa.Table:
    need(found, 2, "join")
    result = found[0]
    for other in found[1:]:
        places = pc.index_in(result[args.on], other[args.on])
        for name in other.column_names:
            if name not in result.column_names:
                result = result.append_column(name, other[name].take(places))
    return result


def members(found: list[pa.Table], args, keep: bool) -> pa.Table:
    need(found, 2, args.verb)
    inside = pc.is_in(found[0][args.on], found[1][args.on].combine_chunks())
    return found[0].filter(inside if keep else pc.invert(inside))


def first_of_each(table: pa.Table, key: str) -> pa.Table:
    numbered = table.select([key]).append_column("row", pa.array(np.arange(table.num_rows)))
    return table.take(numbered.group_by(key).aggregate([("row", "min")])["row_min"].sort())


def bucketed(table: pa.Table, args) -> pa.Table:
    """At most --rows of each shape, the first by a seeded order."""
    order = np.random.default_rng(args.seed).permutation(table.num_rows)
    shapes = table.select(["height", "width", "num_frames"]).to_pylist()
    taken: dict[tuple, int] = {}
    kept = []
    for k in order:
        shape = tuple(shapes[k].values())
        taken[shape] = taken.get(shape, 0) + 1
        if taken[shape] <= args.rows:
            kept.append(int(k))
    return table.take(pa.array(sorted(kept), pa.int64()))


def rooted(table: pa.Table, args) -> pa.Table:
    if not args.root:
        raise UserError("root needs --root=FOLDER")
    paths = table["path"].to_pylist()
    base = args.root.rstrip("/") + "/"
    if args.relative:
        moved = [path.removeprefix(base) for path in paths]
    else:
        moved = [base + path.removeprefix(args.old.rstrip("/") + "/").lstrip("/") for path in paths]
    return tables.set_column(table, "path", pa.array(moved, pa.string()))


def changed(found: list[pa.Table], args) -> pa.Table:
    """The verbs that make one table out of whole ones."""
    table, rng = found[0], np.random.default_rng(args.seed)
    if args.verb == "convert":
        return table
    if args.verb == "merge":
        return pa.concat_tables(found, promote_options="permissive")
    if args.verb == "join":
        return joined(found, args)
    if args.verb in ("subtract", "intersect"):
        return members(found, args, args.verb == "intersect")
    if args.verb == "dedup":
        return first_of_each(table, args.on)
    if args.verb == "sort":
        return table.sort_by([(args.by, "descending" if args.descending else "ascending")])
    if args.verb == "shuffle":
        return table.take(pa.array(rng.permutation(table.num_rows)))
    if args.verb == "head":
        return table.slice(0, args.rows)
    if args.verb == "sample":
        picked = rng.choice(table.num_rows, min(args.rows, table.num_rows), replace=False)
        return table.take(pa.array(np.sort(picked)))
    return bucketed(table, args) if args.verb == "bucket" else rooted(table, args)


def sharded(table: pa.Table, args) -> Iterable[tuple[str, pa.Table]]:
    count = int(args.parts or 1)
    stem, dot, suffix = args.output.rpartition(".")
    for k in range(count):
        start, end = table.num_rows * k // count, table.num_rows * (k + 1) // count
        yield f"{stem}_{k:03d}{dot}{suffix}", table.slice(start, end - start)


def save(table: pa.Table, path: str, args) -> None:
    names = columns_of(table.schema, args)
    table = table.select(names) if names else table
    if path.endswith(".csv"):
        tables.write_csv(table, path, table.column_names)
    elif path.endswith(".parquet"):
        tables.write_parquet(table, path)
    else:
        raise UserError(f"--output {path}: tables are .parquet or .csv")
    print(f"{table.num_rows} rows in {path}")


STREAMED = {"info": info, "filter": filtered, "split": parted}
WHOLE = (
    "convert",
    "merge",
    "join",
    "subtract",
    "intersect",
    "dedup",
    "sort",
    "shuffle",
    "head",
    "sample",
    "bucket",
    "root",
)


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python -m data_pipelines.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("verb", choices=[*STREAMED, *WHOLE, "shard"])
    flags.add_argument("--input", required=True, type=lambda text: text.split(","))
    flags.add_argument("--output", type=lambda path: files.absolute(path))
    flags.add_argument("--columns", default="")
    flags.add_argument("--original", action="store_true")
    flags.add_argument("--keep", default="")
    flags.add_argument("--on", default=None, help="column to match rows by (default id; path for dedup)")
    flags.add_argument("--by", default="id")
    flags.add_argument("--descending", action="store_true")
    flags.add_argument("--rows", type=int, default=1000)
    flags.add_argument("--parts", default="")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--root", default="")
    flags.add_argument("--old", default="")
    flags.add_argument("--relative", action="store_true")
    flags.add_argument("--debug", action="store_true")
    args = flags.parse_args()
    if args.verb != "info" and not args.output:
        raise UserError(f"{args.verb} needs --output=FILE")
    pieces = [tables.Pieces(name) for name in args.input]
    args.on = args.on or ("path" if args.verb == "dedup" else "id")
    wanted = {"sort": args.by, "split": "id", "root": "path"}.get(args.verb)
    wanted = args.on if args.verb in ("join", "subtract", "intersect", "dedup") else wanted
    for source, name in zip(pieces, args.input):
        if wanted and wanted not in source.schema.names:
            raise UserError(f"{name} has no column {wanted}; it has {', '.join(source.schema.names)}")
    if args.verb in STREAMED:
        STREAMED[args.verb](pieces, args)
        return
    found = whole(pieces)
    for path, table in sharded(found[0], args) if args.verb == "shard" else [(args.output, changed(found, args))]:
        save(table, path, args)


if __name__ == "__main__":
    sys.exit(guarded(main))
