"""The procedural data set: one antialiased shape crossing a plain background, with a caption that says exactly that.

Every clip follows from (seed, index). Twelve of the 72 (colour, shape, direction) triples are held out, so that a model can
be asked for what it never saw; every colour, shape and direction occurs on both sides.

    python -m opensora_jax.data.shapes --output=runs/shapes --split=train --count=4096
"""

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError, guarded
from opensora_jax.data.records import ShardWriter, write_manifest
from opensora_jax.data.video_io import encode_video

COLOURS = {
    "red": (222, 34, 34),
    "green": (24, 168, 48),
    "blue": (36, 64, 230),
    "yellow": (236, 216, 20),
    "magenta": (216, 32, 208),
    "cyan": (20, 204, 220),
}
NOVEL_COLOURS = {"orange": (244, 126, 12)}  # never in the training set: what `make demo` teaches
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
BACKGROUNDS = {"dark": (12, 52), "light": (204, 244)}  # range of the grey level

HELD_OUT = (
    ("red", "circle", "left"),
    ("red", "square", "up"),
    ("green", "square", "right"),
    ("green", "triangle", "down"),
    ("blue", "triangle", "up"),
    ("blue", "circle", "left"),
    ("yellow", "circle", "down"),
    ("yellow", "square", "right"),
    ("magenta", "square", "left"),
    ("magenta", "triangle", "up"),
    ("cyan", "triangle", "right"),
    ("cyan", "circle", "down"),
)


@dataclass(frozen=True)
class Scene:
    """What a caption says."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def triple(self) -> tuple[str, str, str]:
        return (self.colour, self.shape, self.direction)

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """The scene of a caption; the inverse of `Scene.caption`."""
    words = caption.split()
    if len(words) == 9:
        scene = Scene(words[1], words[2], words[4], words[7])
        if scene.caption == caption and scene in scenes("all", tuple(COLOURS | NOVEL_COLOURS)):
            return scene
    raise UserError(f"not a caption of the shapes data set: {caption!r} (such as: {scenes('all')[0].caption!r})")


def scenes(split: str, colours: tuple[str, ...] = tuple(COLOURS)) -> list[Scene]:
    """The scenes of a split: train (nothing held out), heldout (only that) or all."""
    if split not in ("train", "heldout", "all"):
        raise UserError(f"shapes: unknown split {split!r}; one of train, heldout, all")
    if unknown := set(colours) - set(COLOURS) - set(NOVEL_COLOURS):
        raise UserError(f"shapes: unknown colour {sorted(unknown)}; one of {', '.join(COLOURS | NOVEL_COLOURS)}")
    every = [Scene(c, s, d, b) for c in colours for s in SHAPES for d in DIRECTIONS for b in BACKGROUNDS]
    return [scene for scene in every if split == "all" or (scene.triple in HELD_OUT) == (split == "heldout")]


def draw(scene: Scene, rng: np.random.Generator, *, num_frames: int = 17, size: int = 64, paint=None) -> np.ndarray:
    """[T, size, size, 3] uint8: random radius, start and speed; the shape is whole in every frame and clearly moves.
    paint: RGB in place of the scene's colour."""
    radius = size * rng.uniform(0.17, 0.25)
    low, high = radius + 1, size - 1 - radius
    travel = rng.uniform(0.28 * size, high - low)
    first = rng.uniform(low, high - travel)
    across = rng.uniform(low, high)
    grey = rng.uniform(*BACKGROUNDS[scene.background])
    if paint is None:
        paint = np.array((COLOURS | NOVEL_COLOURS)[scene.colour])
    paint = np.clip(paint + rng.uniform(-8, 8, 3), 0, 255)

    rows, columns = DIRECTIONS[scene.direction]
    along = first + np.linspace(0, travel, num_frames)
    if rows + columns < 0:
        along = size - along
    centre_y, centre_x = (along, np.full(num_frames, across)) if rows else (np.full(num_frames, across), along)
    pixel = np.arange(size) + 0.5
    y = pixel[None, :, None] - centre_y[:, None, None]
    x = pixel[None, None, :] - centre_x[:, None, None]
    cover = np.clip(0.5 - _distance(scene.shape, y, x, radius), 0, 1)[..., None]
    return np.round(grey * (1 - cover) + paint * cover).astype(np.uint8)


def _distance(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline, negative inside; every shape fits the circle's bounding box."""
    if shape == "circle":
        return np.hypot(y, x) - radius
    if shape == "square":
        return np.maximum(abs(y), abs(x)) - 0.86 * radius
    side = 1.15 * radius  # an upright equilateral triangle with this circumradius, centred on its bounding box
    y = y - 0.25 * side
    return np.maximum(y - side / 2, abs(x) * np.sqrt(0.75) - y / 2 - side / 2)


def any_paint(rng: np.random.Generator) -> np.ndarray:
    """Any RGB but near the hues of NOVEL_COLOURS: a VAE should know colours in general, and still never have seen these."""
    avoid = [colorsys.rgb_to_hsv(*(np.array(rgb) / 255))[0] for rgb in NOVEL_COLOURS.values()]
    while True:
        hue, saturation, value = rng.uniform((0, 0.4, 0.4), 1)
        if all(min(abs(hue - h), 1 - abs(hue - h)) > 15 / 360 for h in avoid):
            return np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255


def make_record(
    index: int,
    *,
    seed: int,
    choices: list[Scene],
    num_frames: int = 17,
    size: int = 64,
    fps: float = 8.0,
    paint: str = "named",
) -> dict:
    """Clip `index` as a record whose pixels are not yet encoded: `frames` in place of `video`. paint="any" draws shapes
    in colours that the caption does not name."""
    rng = np.random.default_rng((seed, index))
    scene = choices[rng.integers(len(choices))]
    frames = draw(scene, rng, num_frames=num_frames, size=size, paint=any_paint(rng) if paint == "any" else None)
    return {
        "id": f"shapes-{seed}-{index:07d}",
        "text": scene.caption,
        "num_frames": num_frames,
        "fps": fps,
        "height": size,
        "width": size,
        "frames": frames,
    }


def write_shapes(
    folder,
    split: str = "train",
    *,
    count: int = 4096,
    seed: int = 0,
    colours: tuple[str, ...] = tuple(COLOURS),
    num_frames: int = 17,
    size: int = 64,
    records_per_shard: int = 512,
) -> dict:
    """Writes `count` clips as ArrayRecord shards (near-lossless mp4 with full chroma) and returns their manifest."""
    choices = scenes(split, colours)
    if not choices:
        raise UserError(f"shapes: split {split!r} holds no scene in {', '.join(colours)}")
    with ShardWriter(folder, records_per_shard=records_per_shard, prefix=f"shapes-{split}") as writer:
        for index in range(writer.records_done, count):
            record = make_record(index, seed=seed, choices=choices, num_frames=num_frames, size=size)
            frames = record.pop("frames")
            writer.write(record | {"video": encode_video(frames, record["fps"], crf=8)})
    return write_manifest(folder, source="shapes", split=split, seed=seed, colours=list(colours))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opensora_jax.data.shapes",
        description="Write the procedural shapes data set as ArrayRecord shards.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--split", default="train", choices=("train", "heldout", "all"))
    parser.add_argument("--count", type=int, default=4096, help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--colours", nargs="+", default=list(COLOURS), help="orange is the colour of `make demo`")
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    args = parser.parse_args()
    options = {key: getattr(args, key) for key in ("count", "seed", "num_frames", "size")}
    manifest = write_shapes(args.output, args.split, colours=tuple(args.colours), **options)
    print(f"{manifest['records']} clips in {len(manifest['shards'])} shards: {args.output}")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
