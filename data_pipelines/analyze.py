"""What a table holds: counts, percentiles and a histogram of every column, as report.html, PNG files and JSON.

    python -m data_pipelines.analyze --input=WORK/table.parquet --output=REPORT [--columns=flow,aes,cmotion]

Reads the table in pieces, so that ten million rows need no more memory than ten thousand: two passes for numbers
(range, then 4096 bins, from which percentiles are exact to a 4096th of the range).
"""

import argparse
import dataclasses
import html
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import files, tables
from opensora_jax.common.errors import UserError, guarded

BINS = 4096
SHOWN = (
    "num_frames",
    "seconds",
    "fps",
    "width",
    "height",
    "aspect_ratio",
    "resolution",
    "filesize",
    "status",
    "text_len",
)
SHOWN += ("aes", "flow", "ocr", "ocr_area", "match", "cmotion", "sharpness", "colorfulness", "luma", "change")


@dataclasses.dataclass
class Summary:
    """One column: running counts."""

    name: str
    rows: int = 0
    missing: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    bins: np.ndarray | None = None
    words: Counter | None = None

    def range(self, column: pa.ChunkedArray) -> None:
        self.rows += len(column)
        self.missing += column.null_count
        if is_text(column.type):
            self.words = self.words if self.words is not None else Counter()
            counted = pc.value_counts(column.drop_null())
            self.words.update(dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist())))
            return
        if len(column) > column.null_count:
            ends = pc.min_max(column)
            self.low = min(self.low, float(ends["min"].as_py()))
            self.high = max(self.high, float(ends["max"].as_py()))
            self.total += float(pc.sum(column).as_py())

    def count(self, column: pa.ChunkedArray) -> None:
        if self.words is not None or self.low > self.high:
            return
        if self.bins is None:
            self.bins = np.zeros(BINS, np.int64)
        values = column.drop_null().to_numpy()
        span = self.high - self.low
        places = ((values - self.low) * (BINS / span)).astype(np.int64) if span else np.zeros(len(values), np.int64)
        self.bins += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)

    def facts(self) -> dict:
        facts = {"rows": self.rows, "missing": self.missing}
        if self.words is not None:
            return facts | {"distinct": len(self.words), "top": dict(self.words.most_common(20))}
        if self.bins is None:
            return facts
        running = np.cumsum(self.bins)
        edges = self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS
        quantiles = {
            f"p{q}": float(edges[np.searchsorted(running, q / 100 * running[-1])]) for q in (1, 5, 25, 50, 75, 95, 99)
        }
        mean = self.total / (self.rows - self.missing)
        return facts | {"min": self.low, "max": self.high, "mean": mean, **quantiles}


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def summarise(pieces: Callable[[list[str]], Iterable[pa.Table]], columns: list[str]) -> list[Summary]:
    """`pieces(columns)` gives the table's rows in pieces; it is gone through twice."""
    summaries = [Summary(name) for name in columns]
    for piece in pieces(columns):
        for summary in summaries:
            summary.range(piece[summary.name])
    numbers = [s for s in summaries if s.words is None]
    for piece in pieces([s.name for s in numbers]) if numbers else ():
        for summary in numbers:
            summary.count(piece[summary.name])
    return summaries


def choose(schema: pa.Schema, wanted: list[str]) -> list[str]:
    unknown = [name for name in wanted if name not in schema.names]
    if unknown:
        raise UserError(f"the table has no column {unknown[0]}; it has {', '.join(schema.names)}")
    fits = lambda kind: is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return wanted or [n for n in SHOWN if n in schema.names and fits(schema.field(n).type)]


def draw(summary: Summary, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 2.4), layout="constrained")
    if summary.words is not None:
        top = summary.words.most_common(12)[::-1]
        axes.barh([str(word)[:24] for word, _ in top], [count for _, count in top])
        axes.set_xlabel("rows", fontsize=7)
    elif summary.bins is not None:
        width = (summary.high - summary.low) / 64
        if width:
            axes.bar(summary.low + np.arange(64) * width, summary.bins.reshape(64, -1).sum(axis=1), width, align="edge")
        else:  # one value
            axes.bar([summary.low], [summary.bins.sum()], 0.1)
            axes.set(xlim=(summary.low - 1, summary.low + 1), xticks=[summary.low])
        axes.set_ylabel("rows", fontsize=7)
    axes.set_title(summary.name, fontsize=9)
    axes.tick_params(labelsize=7)
    with files.replacing(path) as local:
        figure.savefig(local, dpi=110)
    pyplot.close(figure)


def report(summaries: list[Summary], output: str, title: str) -> dict:
    """Writes the PNGs, report.html and report.json; returns what the last holds."""
    facts = {s.name: s.facts() for s in summaries}
    for summary in summaries:
        draw(summary, files.join(output, f"{summary.name}.png"))
    head, *lines = overview(facts)
    cells = lambda kind, line: "<tr>" + "".join(f"<{kind}>{html.escape(cell)}" for cell in line)
    pictures = "".join(f'<a href="#top"><img src="{name}.png" alt="{name}" id="{name}"></a>' for name in facts)
    style = "body{font:14px sans-serif;margin:2em}img{margin:.5em;border:1px solid #ddd}table{border-collapse:collapse}"
    style += "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child{text-align:left}"
    style += "td:last-child{text-align:left}"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style><body id=top>"
    page += f"<h1>{html.escape(title)}</h1><p>{summaries[0].rows if summaries else 0} rows</p>"
    page += f"<table>{cells('th', head)}{''.join(cells('td', line) for line in lines)}</table><p>{pictures}"
    files.write_bytes(files.join(output, "report.html"), page.encode())
    files.write_bytes(files.join(output, "report.json"), json.dumps(facts, indent=1).encode())
    return facts


def overview(facts: dict[str, dict]) -> list[list[str]]:
    """A line a column under a head, for the page and for the terminal; words are shown by how often they occur."""
    numbers = ("missing", "min", "p5", "p25", "p50", "p75", "p95", "max", "mean")
    lines = [["column", *numbers, "most common"]]
    for name, fact in facts.items():
        words = [f"{word} {count}" for word, count in list(fact.get("top", {}).items())[:5]]
        rest = fact.get("distinct", 0) - len(words)
        words += [f"{rest} others"] if rest > 0 else []
        lines.append([name, *(shown(fact.get(key, "")) for key in numbers), ", ".join(words)])
    return lines


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python -m data_pipelines.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--input", required=True)
    flags.add_argument("--output", required=True)
    flags.add_argument("--columns", default="", help="names with commas; without it the usual ones that are there")
    flags.add_argument("--debug", action="store_true")
    args = flags.parse_args()
    source = tables.Pieces(args.input)
    columns = choose(source.schema, [c for c in args.columns.split(",") if c])
    if not columns:
        raise UserError(
            f"{args.input} has none of the usual columns; name some with --columns={','.join(source.schema.names)}"
        )
    facts = report(summarise(source, columns), files.absolute(args.output), args.input)
    lines = overview(facts)
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    for name, *cells in lines:
        print(
            name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:-1])), cells[-1], sep="  "
        )


if __name__ == "__main__":
    sys.exit(guarded(main))
