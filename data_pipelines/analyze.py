"""What a table holds: counts, percentiles and a histogram of every column, as report.html, PNG files and JSON.

    python -m data_pipelines.analyze --input=WORK/table.parquet --output=REPORT [--columns=flow,aes,cmotion]

Reads the table once and in pieces, so that ten million rows need no more memory than ten thousand: numbers are counted
under their first bits, which makes percentiles exact to a 512th of their value, however far the range reaches.
"""

import argparse
import dataclasses
import functools
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

DROPPED = 14  # bits of a float32 that are not looked at: a sign, an exponent and 9 bits are left
BINS = 1 << (32 - DROPPED)
SHOWN = {  # the columns of a report, and what their numbers are
    "num_frames": "frames of a clip",
    "seconds": "seconds",
    "fps": "frames a second",
    "width": "pixels",
    "height": "pixels",
    "aspect_ratio": "height / width",
    "resolution": "height × width, pixels",
    "filesize": "bytes",
    "status": "",
    "words": "words of a caption",
    "text_len": "tokens of a caption",
    "language": "",
    "language_match": "probability of the wanted language",
    "aes": "aesthetic score",
    "flow": "motion, pixels on a grid of 320×576",
    "ocr": "boxes with text",
    "ocr_area": "share of the picture with text",
    "match": "CLIP's logit of caption and picture",
    "cmotion": "",
    "sharpness": "variance of the Laplacian",
    "colorfulness": "Hasler and Süsstrunk's measure",
    "luma": "brightness, 0 to 255",
    "change": "difference of sampled frames, 0 to 255",
}


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

    def add(self, column: pa.ChunkedArray) -> None:
        self.rows += len(column)
        self.missing += column.null_count
        if is_text(column.type):
            self.words = self.words if self.words is not None else Counter()
            counted = pc.value_counts(column.drop_null())
            self.words.update(dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist())))
            return
        values = column.drop_null().to_numpy()
        finite = values[np.isfinite(values)]
        self.missing += len(values) - len(finite)
        if len(finite):
            self.low = min(self.low, float(finite.min()))
            self.high = max(self.high, float(finite.max()))
            self.total += float(finite.sum())
            counts = np.bincount(places(finite), minlength=BINS)
            self.bins = counts if self.bins is None else self.bins + counts

    def quantile(self, share: float) -> float:
        """The least value of which this share of the values is not larger, its last bits cut off."""
        running = np.cumsum(self.bins)
        return float(np.clip(starts()[np.searchsorted(running, share * running[-1])], self.low, self.high))

    def facts(self) -> dict:
        facts = {"rows": self.rows, "missing": self.missing}
        if self.words is not None:
            return facts | {"distinct": len(self.words), "top": dict(self.words.most_common(20))}
        if self.bins is None:
            return facts
        quantiles = {f"p{q}": self.quantile(q / 100) for q in (1, 5, 25, 50, 75, 95, 99)}
        mean = self.total / (self.rows - self.missing)
        return facts | {"min": self.low, "max": self.high, "mean": mean, **quantiles}

    def bars(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Counts, edges, and how many values lie outside: a few far away would press the rest into one bar."""
        most, least = self.quantile(0.995), self.quantile(0.005)
        if self.high - self.low < 4 * (most - least):
            most, least = self.high, self.low
        width = max(most - least, abs(most) / 256)  # narrower, the bins would show as a comb
        many = 64 if self.rows > 1000 else 24
        filled = np.flatnonzero(self.bins)
        at = np.clip(starts()[filled], self.low, self.high)
        inside = (at >= least) & (at <= most)
        counts, edges = np.histogram(at[inside], many, (least, least + width), weights=self.bins[filled][inside])
        return counts, edges, int(self.bins[filled][~inside].sum())


def places(values: np.ndarray) -> np.ndarray:
    """The bin of each number: the first bits of a float32, of negative numbers turned round, are in the numbers' order."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> np.uint32(DROPPED)


@functools.cache
def starts() -> np.ndarray:
    """The number nearest to zero in each bin."""
    keys = np.arange(BINS, dtype=np.uint32) << np.uint32(DROPPED)
    negative = ~keys & ~np.uint32((1 << DROPPED) - 1)
    with np.errstate(invalid="ignore"):
        return np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), negative).view(np.float32).astype(np.float64)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def summarise(pieces: Callable[[list[str]], Iterable[pa.Table]], columns: list[str]) -> list[Summary]:
    """`pieces(columns)` gives the table's rows in pieces."""
    summaries = [Summary(name) for name in columns]
    for piece in pieces(columns):
        for summary in summaries:
            summary.add(piece[summary.name])
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

    figure, axes = pyplot.subplots(figsize=(4.4, 2.8), layout="constrained")
    label, counts = SHOWN.get(summary.name, ""), axes.yaxis
    if summary.words:
        top = summary.words.most_common(12)[::-1]
        axes.barh([str(word)[:24] for word, _ in top], [count for _, count in top])
        label, counts = "rows", axes.xaxis
    elif summary.low == summary.high:
        axes.bar([summary.low], [summary.rows - summary.missing])
        axes.set(ylabel="rows", xlim=(summary.low - 5, summary.low + 5), xticks=[summary.low])
        axes.set_xticklabels([shown(summary.low)])
    elif summary.bins is not None:
        heights, edges, outside = summary.bars()
        axes.bar(edges[:-1], heights, np.diff(edges), align="edge")
        axes.set_ylabel("rows")
        label = f"{label}; {outside:,} rows outside".lstrip("; ") if outside else label
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda value, _: shown(float(value)))
    else:
        axes.text(0.5, 0.5, "no values", ha="center", va="center")
        axes.set_axis_off()
    counts.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    counts.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(label)
    axes.set_title(summary.name)
    axes.spines[["top", "right"]].set_visible(False)
    with files.replacing(path) as local:
        figure.savefig(local, dpi=160)
    pyplot.close(figure)


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
td:last-child, th:last-child { text-align: left; white-space: normal; min-width: 14rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; margin-top: 2rem }
.charts img { width: 100%; box-sizing: border-box; border: 1px solid #8884; border-radius: .4rem }
"""


def report(summaries: list[Summary], output: str, title: str) -> dict:
    """Writes the PNGs, report.html and report.json; returns what the last holds."""
    facts = {s.name: s.facts() for s in summaries}
    for summary in summaries:
        draw(summary, files.join(output, f"{summary.name}.png"))
    files.write_bytes(files.join(output, "report.html"), page(facts, title).encode())
    files.write_bytes(files.join(output, "report.json"), json.dumps(facts, indent=1).encode())
    return facts


def page(facts: dict[str, dict], title: str) -> str:
    title, (head, *lines) = html.escape(title), overview(facts)
    names = [html.escape(name) for name in facts]
    cells = lambda kind, line: "<tr>" + "".join(f"<{kind}>{cell}" for cell in line)
    body = [
        cells("td", [f'<a href="#{name}">{name}</a>', *map(html.escape, line[1:])]) for name, line in zip(names, lines)
    ]
    rows = next(iter(facts.values()))["rows"] if facts else 0
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
            f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{STYLE}</style>',
            f"<h1>{title}</h1><p>{rows:,} rows; p5 is the value that 5% of them do not exceed.",
            f"<div class=table><table>{cells('th', head)}",
            *body,
            "</table></div><div class=charts>",
            *(f'<img src="{name}.png" alt="histogram of {name}" id="{name}">' for name in names),
            "</div>",
        ]
    )


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
    """Three digits are enough to choose a threshold, and no number is shown as a power of ten; report.json has all."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or not value else f"{value:.1e}"


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python -m data_pipelines.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--input", metavar="PATH", required=True, help="a .parquet, a .csv, or a folder of such")
    flags.add_argument("--output", metavar="DIR", required=True, help="folder for the report")
    flags.add_argument(
        "--columns", metavar="A,B,…", default="", help="names with commas; without it the usual ones that are there"
    )
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
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
