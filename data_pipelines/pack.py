"""Clips → ArrayRecord shards for training, with a manifest and a checksum a shard.

    python -m data_pipelines.pack --input=WORK/table.parquet --output=DIR

A record is a msgpack map: id, text, num_frames, fps, height, width, video (the mp4's bytes); every other plain column
of the table goes under meta (opensora_jax/data/records.py has the format). A shard is named after the ids in it, so
that a resumed run and any number of workers write the same files, and clips that come later get shards of their own.
Latents and text embeddings are made from these shards by `python -m opensora_jax.encode`.
"""

import dataclasses
import datetime
import hashlib
import sys

import msgpack
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import entry, files, tables
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError

FIELDS = ("id", "text", "num_frames", "fps", "height", "width")


class Pack(Stage):
    columns_in = ("path", "num_frames", "fps", "height", "width")
    columns_out = {"shard": pa.string(), "record": pa.int64()}
    resources = Resources(num_cpus=1)
    group = "batch"
    scratch = ("batch", "meta")

    @dataclasses.dataclass(frozen=True)
    class Config:
        folder: str = ""  # for the shards; the runner fills it in
        records_per_shard: int = 1024  # clips in a file
        name: str = "clips"  # with which shards begin
        seed: int = 0  # of the order of clips over shards
        extra: str = "all"  # all: every plain column goes under meta; none

    @classmethod
    def check(cls, config):
        if config.records_per_shard < 1:
            raise UserError(f"pack.records_per_shard must be at least 1, not {config.records_per_shard}")
        if config.extra not in ("all", "none"):
            raise UserError(f"pack.extra must be all or none, not {config.extra}")

    @classmethod
    def prepare(cls, table, config):
        """Rows in the order of a seeded hash of their ids, numbered by the shard they go to."""
        marks = [hashlib.sha1(f"{config.seed}:{name}".encode()).digest() for name in table["id"].to_pylist()]
        order = sorted(range(len(marks)), key=marks.__getitem__)
        table = table.take(pa.array(order, pa.int64()))
        plain = [n for n in table.column_names if n not in (*FIELDS, "path", *cls.columns_out)]
        plain = (
            [n for n in plain if not pa.types.is_nested(table.schema.field(n).type)] if config.extra == "all" else []
        )
        meta = table.select(plain).to_pylist() if plain else [{}] * table.num_rows
        packed = [msgpack.packb({k: plainly(v) for k, v in row.items() if v is not None}) for row in meta]
        if "text" not in table.column_names:
            table = tables.set_column(table, "text", pa.nulls(table.num_rows, pa.string()))
        numbers = pa.array([k // config.records_per_shard for k in range(table.num_rows)], pa.int64())
        table = tables.set_column(table, "batch", numbers)
        return tables.set_column(table, "meta", pa.array(packed, pa.binary()))

    @classmethod
    def inputs(cls, config):
        return (*cls.columns_in, "text", "meta")

    def rows(self, rows):
        from opensora_jax.data.records import ShardWriter

        shard = f"{self.config.name}-{files.digest(*(row['id'] for row in rows))}"
        files.remove(files.join(self.config.folder, f"{shard}-00000.json"))  # of a run that died before it could say so
        made, written = [], 0
        with ShardWriter(self.config.folder, records_per_shard=len(rows) + 1, prefix=shard) as writer:
            for row in rows:
                try:
                    writer.write(record(row))
                except (OSError, UserError) as error:
                    made.append({"id": row["id"], "error": str(error)})
                    continue
                made.append({"id": row["id"], "shard": f"{shard}-00000.array_record", "record": written})
                written += 1
        return made

    @classmethod
    def finish(cls, table, config):
        from opensora_jax.data.records import write_manifest

        if not table.num_rows:
            raise UserError("pack: no clip is left to pack")
        manifest = write_manifest(config.folder, payload="video", frames=pc.sum(table["num_frames"]).as_py())
        if manifest["records"] != table.num_rows:
            raise UserError(
                f"{config.folder} holds {manifest['records']} records and the table {table.num_rows} rows: earlier "
                "steps now drop clips that were packed before; remove this folder and its meta/ part to pack anew"
            )


def record(row: dict) -> dict:
    """One training record; a row without a caption has an empty one."""
    fields = {name: row[name] for name in FIELDS}
    fields["text"], fields["fps"] = fields["text"] or "", fields["fps"] or 0.0
    return {**fields, "video": files.read_bytes(row["path"]), "meta": msgpack.unpackb(row["meta"])}


def plainly(value):
    return value.isoformat() if isinstance(value, (datetime.date, datetime.datetime)) else value


STAGE = Pack

if __name__ == "__main__":
    sys.exit(entry.stage(Pack))
