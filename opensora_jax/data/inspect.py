"""python -m opensora_jax.data.inspect --source=SOURCE [--config=FILE] [--output=DIR] [--config.data.key=value ...]

What a data set holds, and what a configuration's buckets make of it: counts by shape, the bucket table with the steps of
an epoch, what finds no bucket and why; histograms (histogram.png) and decoded samples (samples.png) in --output.
--verify first compares every shard of a folder with the checksum in its manifest.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from opensora_jax import config
from opensora_jax.common.contact_sheet import contact_sheet, save_png
from opensora_jax.common.errors import UserError, guarded
from opensora_jax.common.progress import duration

SAMPLES = 8


def arguments(argv=None):
    parser = config.Parser("data.inspect", __doc__)
    parser.add_argument(
        "--source", help="shards, a .csv or .parquet, tfds:… or shapes:… (else the config's data.source)"
    )
    parser.add_argument("--config", metavar="FILE[:variant]", help="take data.* from this configuration")
    parser.add_argument("--output", metavar="DIR", help="write histogram.png and samples.png here")
    parser.add_argument("--batch_scale", type=int, help="data-parallel devices of the run (multiplies batch sizes)")
    parser.add_argument(
        "--verify", action="store_true", help="compare the shards with their checksums (reads them all)"
    )
    return parser.parse(argv)


def main(argv=None) -> int:
    args, overrides = arguments(argv)
    from opensora_jax.data.loader import DataConfig, make_plan, open_sources

    tree = {"data": {}}
    if args.config:
        tree = config.load(args.config, overrides)
    else:
        for word in overrides:
            key, _, text = word.removeprefix("--config.").partition("=")
            config.override(tree, key, text)
    values = dict(tree.get("data") or {})
    values |= {key: value for key in ("source", "batch_scale") if (value := getattr(args, key))}
    if not values.get("source"):
        raise UserError("name a data set: --source=SOURCE, or --config=FILE with data.source")
    data = config.build(DataConfig, values, "config.data")
    if args.verify:
        verify([data.source] if isinstance(data.source, str) else data.source)
    source = open_sources(data)
    print(summary(source))
    plan = make_plan(data, source)
    print(f"\nbuckets of {args.config}" if args.config else "\nbuckets")
    print(plan.format_report())
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\n{histogram(folder / 'histogram.png', source, plan)}")
        if not source.latents:
            print(f"{samples(folder / 'samples.png', source)}: {folder / 'samples.png'}")
    return 0


def verify(folders) -> None:
    """Says that all shards are as they were written, or names those that are not."""
    from opensora_jax.data.records import read_manifest, verify_folder

    for folder in folders:
        if changed := verify_folder(folder):
            raise UserError(
                f"{folder}: not as they were written, or gone: {', '.join(changed)}; pack or copy them again"
            )
        print(f"{folder}: all {len(read_manifest(folder)['shards'])} shards are as they were written")


def summary(source) -> str:
    """Totals, the commonest shapes, and the range of lengths and rates."""
    kind = "latents" if source.latents else "pixels"
    known = source.shapes[source.shapes[:, 0] > 0]
    lines = [f"{len(source)} clips ({kind}), {len(source) - len(known)} unreadable"]
    if len(known):
        fps = source.fps[source.shapes[:, 0] > 0]
        moving = (known[:, 0] > 1) & (fps > 0)
        seconds = float((known[moving, 0] / fps[moving]).sum())
        low, quarter, half, most, high = np.percentile(known[:, 0], (0, 25, 50, 75, 100)).astype(int)
        lines.append(
            f"{int((known[:, 0] == 1).sum())} images, {int((known[:, 0] > 1).sum())} videos, {duration(seconds)}"
        )
        lines.append(f"frames: {low} to {high}, half of the clips {quarter} to {most}, median {half}")
        lines.append(
            "rates: " + ", ".join(f"{rate:g} fps x {count}" for rate, count in Counter(fps.tolist()).most_common(6))
        )
        sizes = Counter(map(tuple, known[:, 1:].tolist())).most_common(8)
        lines.append("sizes: " + ", ".join(f"{height}x{width} x {count}" for (height, width), count in sizes))
    return "\n".join(lines)


def histogram(path: Path, source, plan) -> str:
    """Frames, pixels and aspect ratio of the clips, and clips a bucket; where the picture is."""
    try:
        import matplotlib
    except ImportError:
        return f"no {path.name}, which needs matplotlib: pip install 'opensora-jax[viz]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    known, rows = source.shapes[source.shapes[:, 0] > 0].astype(float), plan.report()
    tall = 1 + 0.22 * len(rows)  # inches that let each bucket's name be read
    figure = pyplot.figure(figsize=(11, 3.2 + tall), layout="constrained")
    top, bottom = np.ravel(figure.subfigures(2, 1, height_ratios=(3.2, tall)))
    values = (known[:, 0], np.sqrt(known[:, 1] * known[:, 2]), known[:, 1] / np.maximum(known[:, 2], 1))
    names = ("frames of a clip", "pixels of a side: √(height × width)", "height / width")
    for axis, data, name in zip(top.subplots(1, 3), values, names):
        low, high = data.min(initial=np.inf), data.max(initial=-np.inf)
        axis.hist(data, bins=40, range=(low * 0.9, high * 1.1) if high - low < 0.1 * high else None, color="#4878a8")
        axis.set(xlabel=name, ylabel="clips")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis = bottom.subplots()
    names = [f"{row['resolution']}, {row['frames']} frames" for row in rows]
    colors = ["#b04a4a" if row["note"] else "#4878a8" for row in rows]
    axis.barh(names, [row["clips"] for row in rows], height=0.7, color=colors)
    axis.set(xlabel="clips in a bucket" + (" (red: too few or none)" if "#b04a4a" in colors else ""))
    for label, color in zip(axis.get_yticklabels(), colors):
        label.set_color("black" if color == "#4878a8" else color)  # an empty bucket has no bar to be red
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return str(path)


def samples(path: Path, source) -> str:
    """Decodes clips spread over the data set; the ones that cannot be read are named in place of a picture."""
    from opensora_jax.data.sources import media
    from opensora_jax.data.video_io import VideoError, read_frames

    clips, captions, broken = [], [], []
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLES).astype(int)).tolist():
        try:
            record = source[index]
            frames = record.get("frames")
            if frames is None:
                wanted = np.unique(np.linspace(0, record["num_frames"] - 1, 6).astype(int))
                frames = read_frames(record.get("video") or media(record["path"]), indices=wanted)
        except (VideoError, ValueError, OSError) as error:
            broken.append(f"clip {index}: {error}")
            continue
        clips.append(frames)
        captions.append(f"{record['id']}: {record['text'] or '(no caption)'}")
    for line in broken:
        print(f"not readable: {line}")
    if not clips:
        raise UserError("none of the samples can be decoded; see the lines above")
    save_png(path, contact_sheet(clips, captions))
    return f"{len(clips)} samples"


if __name__ == "__main__":
    sys.exit(guarded(main))
