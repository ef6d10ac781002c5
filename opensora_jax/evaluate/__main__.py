"""python -m opensora_jax.evaluate --real=DIR --generated=DIR [--metrics=psnr,ssim,lpips,fvd] [--lpips=...] [--i3d=...]
python -m opensora_jax.evaluate --generated=DIR --metrics=clip_score --prompts=FILE --clip=FOLDER

How good generated or reconstructed videos are. PSNR, SSIM and LPIPS compare each video with its original (sorted by
file name), FVD the two sets, the CLIP score each video with its prompt. A table is printed, --out writes it as JSON.
Networks are the published ones; none is shipped:

    --lpips   vgg.pth or alex.pth of richzhang/PerceptualSimilarity, and torchvision's backbone, joined by a comma
    --i3d     i3d_pretrained_400.pt, logits on Kinetics-400
    --clip    a folder of openai/clip-vit-base-patch32 (config.json, weights, tokenizer)
"""

import json
import sys
from pathlib import Path

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded

METRICS = {  # name → (flags that it needs, what a better number is)
    "psnr": (("real",), "higher"),
    "ssim": (("real",), "higher"),
    "lpips": (("real", "lpips"), "lower"),
    "fvd": (("real", "i3d"), "lower"),
    "clip_score": (("prompts", "clip"), "higher"),
}
UNPAIRED = {"fvd", "clip_score"}


def arguments(argv=None):
    parser = config.Parser("evaluate", __doc__)
    add = parser.add_argument
    add("--generated", metavar="DIR", help="folder of videos or images to judge")
    add("--real", metavar="DIR", help="folder of their originals, under sorted names in the same order")
    add("--metrics", default="psnr,ssim", help=f"of {', '.join(METRICS)}, joined by commas (psnr,ssim)")
    add(
        "--prompts", metavar="FILE", help="one prompt a line, in the order of the sorted videos; or JSON {name: prompt}"
    )
    add("--lpips", metavar="FILES", help="weights of LPIPS")
    add("--i3d", metavar="FILE", help="weights of I3D, for FVD")
    add("--clip", metavar="FOLDER", help="CLIP, for its score")
    add("--num_frames", type=int, default=16, help="frames of each video that count, from its first (16)")
    add("--sample_rate", type=int, default=1, help="one frame in so many is taken (1)")
    add("--resolution", type=int, help="scale the shorter side to this first (as stored)")
    add("--crop", type=int, help="then cut a square of this size from the centre")
    add("--fvd_convention", choices=("styleganv", "videogpt"), default="styleganv", help="how frames are prepared")
    add(
        "--fvd_lengths",
        choices=("whole", "mean"),
        default="whole",
        help="of whole clips, or the mean from 10 frames on",
    )
    add("--limit", type=int, help="only the first videos of each folder")
    add("--batch_size", type=int, default=8, help="videos at a time (8)")
    add("--out", metavar="FILE", help="write the report as JSON")
    args, overrides = parser.parse(argv)
    if overrides:
        raise UserError(f"{overrides[0]}: evaluate has no configuration file, only flags")
    for flag in ("num_frames", "sample_rate", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1")
    return args


def chosen(args) -> list[str]:
    """The metrics asked for, each with all it needs."""
    if not args.generated:
        raise UserError("--generated=DIR is missing: the videos to judge")
    names = [name for name in args.metrics.split(",") if name]
    if not names:
        raise UserError(f"--metrics is empty; there are {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise UserError(
                f"--metrics: {name} is unknown{config.nearest(name, METRICS)}; there are {', '.join(METRICS)}"
            )
        missing = [f"--{flag}" for flag in METRICS[name][0] if not getattr(args, flag)]
        if missing:
            raise UserError(f"{name} needs {' and '.join(missing)}; see python -m opensora_jax.evaluate --help")
    if "fvd" in names and args.num_frames < 10:
        raise UserError(f"fvd needs at least 10 frames a video, --num_frames is {args.num_frames}")
    return names


def main(argv=None) -> int:
    args = arguments(argv)
    names = chosen(args)
    from opensora_jax.evaluate import videos

    generated = videos.find(args.generated, "generated", args.limit)
    real = videos.find(args.real, "real", args.limit) if args.real else []
    if real and len(real) != len(generated) and set(names) - UNPAIRED:
        raise UserError(
            f"{args.real} holds {len(real)} videos and {args.generated} {len(generated)}; only fvd and clip_score "
            "can do with different numbers (--limit takes the first of each)"
        )
    prompts = videos.read_prompts(args.prompts, generated) if "clip_score" in names else []
    report = {
        "videos": len(generated),
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("out", "debug") and value is not None
        },
        "metrics": measure(names, real, generated, prompts, args),
    }
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    return 0


def measure(names, real, generated, prompts, args) -> dict:
    from opensora_jax.common.progress import Progress
    from opensora_jax.evaluate import scores, videos

    view = videos.View(args.num_frames, args.sample_rate, args.resolution, args.crop)
    metrics = {name: scores.make(name, args) for name in names}
    total = max(len(generated), len(real))
    with Progress("evaluating", total=total) as bar:
        for start in range(0, total, args.batch_size):
            part = slice(start, start + args.batch_size)
            clips = [videos.stacked(paths[part], view) if paths[part] else None for paths in (real, generated)]
            for metric in metrics.values():
                metric.update(*clips, prompts[part])
            bar.update(min(args.batch_size, total - start))
    return {name: metric.result() for name, metric in metrics.items()}


def table(report: dict) -> str:
    lines = [f"{'metric':12s} {'value':>10s} {'std':>9s}  better"]
    for name, found in report["metrics"].items():
        std = f"{found['std']:9.4f}" if "std" in found else " " * 9
        lines.append(f"{name:12s} {found['value']:10.4f} {std}  {METRICS[name][1]}")
    return "\n".join([*lines, f"{report['videos']} videos, {report['settings']['num_frames']} frames each"])


if __name__ == "__main__":
    sys.exit(guarded(main))
