"""python -m opensora_jax.sample --prompt="a red circle moving left" [--from=FOLDER|WORKDIR[@step]|HUB_ID] [--out=DIR]

Videos from text, and from images and videos where the network takes them: --image=first.png, --image="first.png;last.png",
--video=clip.mp4, --loop=4. Without --from it uses the small pipeline that ships with the package, so this works offline.
"""

import json
import sys
import time

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded

DEFAULT = "tiny"


def arguments(argv=None):
    parser = config.Parser("sample", __doc__)
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        default=DEFAULT,
        help="pipeline folder, training WORKDIR[@step] or Hub id (the shipped one)",
    )
    add("--config", metavar="FILE", help="a file of configs/sample/ that sets the values below")
    add("--prompt", action="append", default=[], help="what to show; may be given several times")
    add("--prompt_file", metavar="TXT", help="one prompt a line")
    add("--negative_prompt", help="what to avoid (default: the learned empty caption)")
    add("--num_samples", type=int, default=1, help="videos a prompt (1)")
    add("--seed", type=int, default=0, help="sample k of a prompt has seed + k (0)")
    add("--steps", type=int, help="denoising steps (the pipeline's own)")
    add("--guidance", type=float, help="classifier-free guidance scale (the pipeline's own)")
    add("--image_guidance", type=float, help="guidance scale of given frames, where they have one (1.3, 2.0)")
    add("--image", metavar="FILE", help="begin with this image; FIRST;LAST connects two")
    add("--video", metavar="FILE", help="begin as this video begins")
    add("--reference", action="append", default=[], metavar="FILE", help="for --condition or --mask_strategy; repeat")
    add("--condition", metavar="KIND", help="frames that are given: i2v_head i2v_tail i2v_loop v2v_head v2v_tail ...")
    add("--mask_strategy", metavar="S", help='1.1 to 1.3: "loop,reference,start,target,length,edit ratio;..."')
    add("--loop", type=int, help="clips of a long video, each going on from the one before (1)")
    add("--condition_frame_length", type=int, help="latent frames that a clip takes over from the one before")
    add("--num_frames", type=int, help="frames in the video (of one clip)")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--resolution", help="e.g. 240p, 480p, 720p; with --aspect_ratio instead of height and width")
    add("--aspect_ratio", default="9:16", help="height:width, e.g. 9:16 (landscape), 1:1, 16:9 (portrait)")
    add("--fps", type=float, help="frames a second, as the model is told and as the video plays")
    add("--batch_size", type=int, default=8, help="videos made at a time (8)")
    add("--dtype", choices=("float32", "bfloat16"), help="of computation (as stored in the pipeline)")
    add("--mesh", default="", help="e.g. data=2,fsdp=4,rules=fsdp (all devices on data)")
    add(
        "--gif",
        action=argparse_boolean(),
        default=True,
        help="also write a GIF of each video, enlarged when it is small",
    )
    add("--out", default="outputs", metavar="DIR", help="where videos go (outputs)")
    return parser.parse(argv)


def argparse_boolean():
    import argparse

    return argparse.BooleanOptionalAction


def main(argv=None) -> int:
    args, overrides = arguments(argv)
    more = with_settings(args, config.load(args.config, overrides) if args.config else config.changed({}, overrides))
    prompts = read_prompts(args.prompt, args.prompt_file)
    height, width = frame_size(args)
    out_folder = prepare(args.out)

    from opensora_jax.common import log
    from opensora_jax.common.contact_sheet import contact_sheet, save_png
    from opensora_jax.common.progress import Progress
    from opensora_jax.parallel import runtime
    from opensora_jax.pipeline import Pipeline

    runtime.start()
    log.setup()
    began = time.monotonic()
    pipeline = Pipeline.from_pretrained(args.source, layout=layout_of(args.mesh), dtype=args.dtype)
    jobs = [(text, args.seed + k) for text in prompts for k in range(args.num_samples)]
    log.logger.info("%s loaded; %d videos to make", pipeline.source, len(jobs))
    done, sheets = [], []
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first : first + args.batch_size]
        title = f"sampling {first + 1}-{first + len(batch)} of {len(jobs)}" if len(jobs) > 1 else "sampling"
        with Progress(title, total=(args.steps or pipeline.sampling.steps) * (args.loop or 1)) as bar:
            out = pipeline.generate(
                [text for text, _ in batch], [seed for _, seed in batch],
                negative_prompt=args.negative_prompt, steps=args.steps, guidance_scale=args.guidance,
                num_frames=args.num_frames, height=height, width=width, fps=args.fps,
                callback=lambda i, _, bar=bar: bar.update(), **given_frames(args), **more,
            )  # fmt: skip
        for (text, seed), frames in zip(batch, out.frames):
            done.append(save(out_folder, len(done), text, seed, frames, out.fps, pipeline, args))
            sheets.append((f"{text}   (seed {seed})", frames))
    shown = sheets[:24]
    save_png(out_folder / "sheet.png", contact_sheet([f for _, f in shown], [t for t, _ in shown]))
    log.logger.info("%d videos and sheet.png in %s, %.1f s", len(done), out_folder, time.monotonic() - began)
    for path in done[:8]:
        print(path)
    return 0


def with_settings(args, settings: dict) -> dict:
    """Puts values of a sample config where the command line is silent; what has no flag is returned."""
    more = {}
    for key, value in settings.items():
        if not hasattr(args, key):
            more[key] = value
        elif getattr(args, key) in (None, [], "", DEFAULT) or key not in given_flags():
            setattr(args, key, [value] if key in ("prompt", "reference") and isinstance(value, str) else value)
    if more:
        from opensora_jax.generator import SamplingConfig

        known = SamplingConfig.__dataclass_fields__
        for key in more.keys() - known:
            raise UserError(f"config.{key} is no setting of sample{config.nearest(key, [*vars(args), *known])}")
    return more


def given_frames(args) -> dict:
    """What the network is to be given beside the prompt."""
    return {
        "image": args.image,
        "video": args.video,
        "references": args.reference or None,
        "condition": args.condition,
        "mask_strategy": args.mask_strategy,
        "loop": args.loop,
        "condition_frame_length": args.condition_frame_length,
        "image_guidance_scale": args.image_guidance,
    }


def given_flags() -> set[str]:
    return {word[2:].partition("=")[0] for word in sys.argv if word.startswith("--")}


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    texts = list(prompts)
    if file:
        try:
            with open(file) as handle:
                lines = handle.read().splitlines()
        except OSError as error:
            raise UserError(f"--prompt_file={file}: {error.strerror}") from None
        if not lines:
            raise UserError(f"{file} is empty; give one prompt a line")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise UserError(f"{file} line {number} is empty; give one prompt a line")
        texts += [line.strip() for line in lines]
    if not texts:
        raise UserError('no prompt; say --prompt="a red circle moving left" or --prompt_file=prompts.txt')
    if not all(text.strip() for text in texts):
        raise UserError("--prompt is empty; say what the video should show")
    return texts


def frame_size(args) -> tuple[int | None, int | None]:
    if not args.resolution:
        return args.height, args.width
    if args.height or args.width:
        raise UserError("--resolution and --height/--width exclude each other")
    from opensora_jax.common.aspect import image_size

    try:
        return image_size(args.resolution, args.aspect_ratio)
    except ValueError as error:
        raise UserError(f"--resolution/--aspect_ratio: {error}") from None


def prepare(out: str):
    from etils import epath

    folder = epath.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
    return folder


def layout_of(text: str):
    """data=2,fsdp=4,rules=fsdp → a layout over all devices; nothing for one device."""
    import jax

    from opensora_jax.parallel import shard
    from opensora_jax.parallel.mesh import MeshConfig, make_mesh

    if not text and jax.device_count() == 1:
        return None
    values: dict = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        config.override(values, key, value)
    mesh = config.build(MeshConfig, values, "--mesh")
    return shard.layout(make_mesh(mesh), mesh.rules, mesh.attention)


def save(folder, index: int, text: str, seed: int, frames, fps: float, pipeline, args):
    """An mp4 (a PNG for one frame), a GIF to look at and a JSON that says how it was made."""
    from opensora_jax import __version__
    from opensora_jax.common.contact_sheet import enlarged, save_png
    from opensora_jax.data.video_io import write_gif, write_video

    slug = "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:60]
    stem = f"{index:04d}-{slug}-seed{seed}"
    if len(frames) == 1:
        path = folder / f"{stem}.png"
        save_png(path, frames[0])
    else:
        path = folder / f"{stem}.mp4"
        write_video(path, frames, fps=fps)
        if args.gif:
            write_gif(folder / f"{stem}.gif", enlarged(frames), fps=fps)
    made = {"prompt": text, "seed": seed, "from": pipeline.source, "fps": fps, "frames": len(frames)}
    made |= {"height": frames.shape[1], "width": frames.shape[2], "steps": args.steps or pipeline.sampling.steps}
    made |= {"guidance": pipeline.sampling.guidance_scale if args.guidance is None else args.guidance}
    made |= {"negative_prompt": args.negative_prompt, "version": __version__}
    made |= {name: value for name, value in given_frames(args).items() if value is not None}
    (folder / f"{stem}.json").write_text(json.dumps(made, indent=2) + "\n")
    return path


def run() -> None:
    sys.exit(guarded(main))


if __name__ == "__main__":
    run()
