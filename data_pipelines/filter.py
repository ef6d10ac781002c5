"""Keeps the rows for which every condition holds, and says what each condition removed.

    python -m data_pipelines.filter --input=WORK/table.parquet --output=DIR --keep="aes >= 5,num_frames >= 48"

A condition is an expression over columns: comparisons, and or not, + - * / %, in (…), abs, ceil, round, len, lower,
contains, startswith, endswith, matches (a regular expression), replace, stem (of a path), is_null, if_null. A row whose value is missing fails a condition and is counted apart, because scores that
were never computed are the usual reason why a filter empties a data set. A filter that removes everything is an error.
"""

import dataclasses
import sys

import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import entry
from data_pipelines.expression import Expression
from data_pipelines.stage import TableStage
from opensora_jax.common.errors import UserError


class Filter(TableStage):
    @dataclasses.dataclass(frozen=True)
    class Config:
        keep: tuple[str, ...]  # conditions with commas
        allow_empty: bool = False  # an empty result is no error

    @classmethod
    def check(cls, config):
        for text in config.keep:
            Expression(text)

    @classmethod
    def inputs(cls, config):
        return tuple(dict.fromkeys(name for text in config.keep for name in Expression(text).columns))

    def table(self, table):
        tally = Tally(self.config.keep)
        kept = table.filter(tally.add(table))
        if table.num_rows and not kept.num_rows and not self.config.allow_empty:
            raise UserError("the filter removes every row: " + "; ".join(tally.lines()))
        return kept, tally.report()


class Tally:
    """Counts of each condition over any number of batches."""

    def __init__(self, keep: tuple[str, ...]):
        self.conditions = [Expression(text) for text in keep]
        self.rows = self.kept = 0
        self.counts = [{"fails": 0, "missing": 0, "only": 0} for _ in keep]

    def add(self, table: pa.Table) -> pa.ChunkedArray | pa.Array:
        """The mask of rows to keep."""
        passes = []
        for condition, count in zip(self.conditions, self.counts):
            verdict = condition.mask(table)
            count["missing"] += verdict.null_count
            verdict = pc.fill_null(verdict, False)
            count["fails"] += table.num_rows - (pc.sum(verdict).as_py() or 0)
            passes.append(verdict)
        mask = pa.repeat(True, table.num_rows)
        for verdict in passes:
            mask = pc.and_(mask, verdict)
        failures = sum_of(pc.cast(pc.invert(verdict), pa.int8()) for verdict in passes)
        for verdict, count in zip(passes, self.counts):
            count["only"] += pc.sum(pc.and_(pc.equal(failures, 1), pc.invert(verdict))).as_py() or 0
        self.rows += table.num_rows
        self.kept += pc.sum(mask).as_py() or 0
        return mask

    def report(self) -> dict:
        conditions = [{"condition": c.text, **count} for c, count in zip(self.conditions, self.counts)]
        return {"rows": self.rows, "kept": self.kept, "conditions": conditions, "lines": self.lines()}

    def lines(self) -> list[str]:
        lines = []
        for condition, count in zip(self.conditions, self.counts):
            missing = f", {count['missing']} of them have no value" if count["missing"] else ""
            lines.append(f"{condition.text}: {count['fails']} of {self.rows} fail ({count['only']} only here{missing})")
        return lines


def sum_of(arrays):
    total = None
    for array in arrays:
        total = array if total is None else pc.add(total, array)
    return total


STAGE = Filter

if __name__ == "__main__":
    sys.exit(entry.stage(Filter))
