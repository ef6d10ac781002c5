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
        frames = ", ".join(
            f"{q}% {int(value)}"
            for q, value in zip((0, 25, 50, 75, 100), np.percentile(known[:, 0], (0, 25, 50, 75, 100)))
        )
        lines.append(
            f"{int((known[:, 0] == 1).sum())} images, {int((known[:, 0] > 1).sum())} videos, {seconds / 3600:.2f} hours"
        )
        lines.append(f"frames by share of clips: {frames}")
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

    known = source.shapes[source.shapes[:, 0] > 0].astype(float)
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7))
    values = (known[:, 0], np.sqrt(known[:, 1] * known[:, 2]), known[:, 1] / np.maximum(known[:, 2], 1))
    for axis, data, name in zip(axes.flat, values, ("frames", "square root of pixels", "height / width")):
        axis.hist(data, bins=40, color="#4878a8")
        axis.set(xlabel=name, ylabel="clips")
    rows = plan.report()
    names = [f"{row['resolution']} {row['frames']}f" for row in rows]
    axes[1, 1].barh(
        names, [row["clips"] for row in rows], color=["#b04a4a" if row["note"] else "#4878a8" for row in rows]
    )
    axes[1, 1].set(xlabel="clips a bucket (red: starving)")
    axes[1, 1].invert_yaxis()
    figure.tight_layout()
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
        captions.append(f"{record['id']}: {record['text']}")
    for line in broken:
        print(f"not readable: {line}")
    if not clips:
        raise UserError("none of the samples can be decoded; see the lines above")
    save_png(path, contact_sheet(clips, captions))
    return f"{len(clips)} samples"


if __name__ == "__main__":
    sys.exit(guarded(main))
