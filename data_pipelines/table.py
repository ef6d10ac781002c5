"""Operations on whole data sets, one command: what the originals spread over datautil, csvutil and split.

    python -m data_pipelines.table VERB --input=A[,B …] --output=FILE [options]

  info                          rows, columns and what is missing
  convert                       Parquet ⇄ CSV; --columns=… chooses and orders; --original keeps the originals' columns
  filter                        --keep="aes >= 5,num_frames >= 48"; says what each condition removed
  set                           --value="resolution = height * width, id = stem(path)": columns from others, in turn
  captions                      text from the NAME.txt or NAME.json beside each path, where there is one
  merge                         rows of all inputs; columns that one lacks are empty
  join                          columns of the later inputs beside the first, matched --on=id
  update                        values of the later inputs in place of the first's, matched --on: new captions, say
  subtract, intersect           rows of the first that are (not) in the second, matched --on
  dedup                         the first row of each value of --on=path, and those without one
  sort                          --by=aes [--descending]
  shuffle, head, sample         --seed=0, --rows=1000
  shard                         --parts=8: FILE_000 … FILE_007, in order
  split                         --parts=train:0.98,val:0.02 by a hash of --on=id, so that growing data keep their side
  bucket                        at most --rows of each bucket of --config=configs/…, or of each shape: a small sample of all
  root                          --root=/new makes paths below --old absolute; --relative takes --root away

info, filter, set and split read the table in pieces and write as they go: any number of rows in bounded memory.
"""

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from data_pipelines import files, tables
from data_pipelines.expression import Expression
from data_pipelines.filter import Tally
from data_pipelines.stage import split_commas
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
    tally, sink = Tally(tuple(part.strip() for part in split_commas(args.keep))), Sink(args.output)
    for piece in pieces[0]():
        sink.add(piece.filter(tally.add(piece)))
    sink.close(pieces[0].schema)
    print("\n".join([*tally.lines(), f"{tally.kept} of {tally.rows} rows kept"]))


def with_values(pieces: list[tables.Pieces], args) -> None:
    """Each NAME = EXPRESSION in turn, so that the next may read what the last has made."""
    parts = [part.partition("=") for part in split_commas(args.value)]
    if not all(name.strip().isidentifier() and value.strip() for name, _, value in parts):
        raise UserError('set needs --value="NAME = EXPRESSION[, NAME = EXPRESSION …]"')
    made, sink = [(name.strip(), Expression(value)) for name, _, value in parts], Sink(args.output)
    source = pieces[0]
    for piece in itertools.chain(source(), [] if source.data.count_rows() else [source.schema.empty_table()]):
        for name, expression in made:
            piece = tables.set_column(piece, name, expression.values(piece))
        sink.add(piece)
    sink.close(source.schema)
    print(f"{sink.rows} rows in {args.output}")


def parted(pieces: list[tables.Pieces], args) -> None:
    """Train, validation and so on, by a hash of --on: a row never changes sides when rows are added."""
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
        side = np.searchsorted(edges, uniform(piece[args.on], args.seed), side="right")
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


def updated(found: list[pa.Table], args) -> pa.Table:
    """The first table with the values of the later ones, where they have one; columns it lacks are not added."""
    need(found, 2, "update")
    result = found[0]
    for other in found[1:]:
        places = pc.index_in(result[args.on], other[args.on])
        print(f"{len(places) - places.null_count} of {result.num_rows} rows have a counterpart")
        for name in set(other.column_names) & set(result.column_names) - {args.on}:
            values = other[name].take(places).cast(result[name].type)
            result = tables.set_column(result, name, pc.coalesce(values, result[name]))
    return result


def captioned(table: pa.Table, args) -> pa.Table:
    folder = os.path.dirname(files.absolute(args.input[0]))
    old = table["text"].to_pylist() if "text" in table.column_names else [None] * table.num_rows
    found = [tables.sidecar(os.path.join(folder, path)) for path in table["path"].to_pylist()]
    print(f"{sum(text is not None for text in found)} of {table.num_rows} rows have a caption beside them")
    texts = [before if text is None else text for before, text in zip(old, found)]
    return tables.set_column(table, "text", pa.array(texts, pa.string()))


def members(found: list[pa.Table], args, keep: bool) -> pa.Table:
    need(found, 2, args.verb)
    inside = pc.is_in(found[0][args.on], found[1][args.on].combine_chunks())
    return found[0].filter(inside if keep else pc.invert(inside))


def first_of_each(table: pa.Table, key: str) -> pa.Table:
    """Rows without a value stay: that two are unknown makes them no doubles."""
    numbered = table.select([key]).append_column("row", pa.array(np.arange(table.num_rows)))
    first = numbered.group_by(key).aggregate([("row", "min")])["row_min"]
    return table.filter(pc.or_(pc.is_null(table[key]), pc.is_in(numbered["row"], first.combine_chunks())))


def bucketed(table: pa.Table, args) -> pa.Table:
    """At most --rows of each bucket of a training config, or else of each shape; which, a seeded order says."""
    shapes = list(zip(*(table[name].fill_null(0).to_pylist() for name in ("num_frames", "height", "width"))))
    bucket_of = training_buckets(args.config) if args.config else lambda shape, seed: shape
    taken, kept, homeless = Counter(), [], 0
    for k in np.random.default_rng(args.seed).permutation(table.num_rows).tolist():
        bucket = bucket_of(shapes[k], k)
        if bucket is None:
            homeless += 1
            continue
        taken[bucket] += 1
        if taken[bucket] <= args.rows:
            kept.append(k)
    print(f"{len(taken)} buckets, {homeless} rows without one")
    return table.take(pa.array(sorted(kept), pa.int64()))


def training_buckets(path: str) -> Callable:
    from opensora_jax import config
    from opensora_jax.data.buckets import BucketTable
    from opensora_jax.data.loader import DataConfig

    data = config.build(DataConfig, config.load(path, []).get("data") or {}, "config.data")
    if not data.buckets:
        raise UserError(f"{path} has no data.buckets")
    table = BucketTable(data.buckets, data.bucket_version, aspect_first=data.aspect_first, multiple=data.size_multiple)
    return lambda shape, seed: table.assign(*shape, interval=data.frame_interval, seed=seed)


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


def ordered(table: pa.Table, args) -> pa.Table:
    return table.sort_by([(args.by, "descending" if args.descending else "ascending")])


def shuffled(table: pa.Table, args) -> pa.Table:
    return table.take(pa.array(np.random.default_rng(args.seed).permutation(table.num_rows)))


def sampled(table: pa.Table, args) -> pa.Table:
    count = min(args.rows, table.num_rows)
    picked = np.random.default_rng(args.seed).choice(table.num_rows, count, replace=False)
    return table.take(pa.array(np.sort(picked)))


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


STREAMED = {"info": info, "filter": filtered, "set": with_values, "split": parted}
ONE = {  # whole tables → one table
    "convert": lambda table, args: table,
    "shard": lambda table, args: table,
    "captions": captioned,
    "dedup": lambda table, args: first_of_each(table, args.on),
    "sort": ordered,
    "shuffle": shuffled,
    "head": lambda table, args: table.slice(0, args.rows),
    "sample": sampled,
    "bucket": bucketed,
    "root": rooted,
}
SEVERAL = {
    "merge": lambda found, args: pa.concat_tables(found, promote_options="permissive"),
    "join": joined,
    "update": updated,
    "subtract": lambda found, args: members(found, args, keep=False),
    "intersect": lambda found, args: members(found, args, keep=True),
}
MATCHED = ("join", "update", "subtract", "intersect", "dedup", "split")  # by --on


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python -m data_pipelines.table",
        usage="%(prog)s VERB --input=A[,B …] --output=FILE [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("verb", metavar="VERB", help="one of those above", choices=[*STREAMED, *ONE, *SEVERAL])
    flags.add_argument(
        "--input", metavar="A,B", required=True, type=lambda text: text.split(","), help="tables, with commas"
    )
    flags.add_argument("--output", metavar="FILE", type=lambda path: files.absolute(path), help="a .parquet or .csv")
    flags.add_argument(
        "--columns", metavar="A,B", default="", help="names with commas: the columns to write, in this order"
    )
    flags.add_argument("--original", action="store_true", help="write the columns that the originals know")
    flags.add_argument("--keep", metavar="CONDITIONS", default="", help="of filter: conditions with commas")
    flags.add_argument(
        "--value", metavar="NAME=EXPRESSION", default="", help="of set: NAME = EXPRESSION, several with commas"
    )
    flags.add_argument(
        "--on", metavar="COLUMN", default=None, help="column that tells rows apart (default id; path for dedup)"
    )
    flags.add_argument("--by", metavar="COLUMN", default="id", help="of sort: a column")
    flags.add_argument("--descending", action="store_true", help="of sort: the largest first")
    flags.add_argument("--rows", metavar="N", type=int, default=1000, help="of head, sample and bucket")
    flags.add_argument("--config", metavar="FILE", default="", help="of bucket: a training config with data.buckets")
    flags.add_argument("--parts", metavar="PARTS", default="", help="of shard: how many; of split: names and shares")
    flags.add_argument("--seed", metavar="N", type=int, default=0, help="of shuffle, sample, bucket and split")
    flags.add_argument("--root", metavar="DIR", default="", help="of root: the folder where the files are")
    flags.add_argument("--old", metavar="DIR", default="", help="of root: the folder where they were")
    flags.add_argument("--relative", action="store_true", help="of root: take --root away from the paths")
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = flags.parse_args()
    if args.verb != "info" and not args.output:
        raise UserError(f"{args.verb} needs --output=FILE")
    if len(args.input) > 1 and args.verb not in ("info", *SEVERAL):
        raise UserError(f"{args.verb} takes one input; make one of {', '.join(args.input)} with merge first")
    pieces = [tables.Pieces(name) for name in args.input]
    args.on = args.on or ("path" if args.verb == "dedup" else "id")
    wanted = {"sort": [args.by], "root": ["path"], "captions": ["path"], "bucket": ["num_frames", "height", "width"]}
    wanted = [args.on] if args.verb in MATCHED else wanted.get(args.verb, [])
    for source, name in zip(pieces, args.input):
        for column in wanted:
            if column not in source.schema.names:
                raise UserError(f"{name} has no column {column}; it has {', '.join(source.schema.names)}")
    if args.verb in STREAMED:
        STREAMED[args.verb](pieces, args)
        return
    found = whole(pieces)
    try:
        made = SEVERAL[args.verb](found, args) if args.verb in SEVERAL else ONE[args.verb](found[0], args)
    except pa.ArrowException as error:
        raise UserError(f"{args.verb}: these tables do not fit: {error}") from error
    for path, table in sharded(made, args) if args.verb == "shard" else [(args.output, made)]:
        save(table, path, args)


if __name__ == "__main__":
    sys.exit(guarded(main))
