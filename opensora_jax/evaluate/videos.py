"""The videos that an evaluation compares: which files, which of their frames, at what size."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError


@dataclass(frozen=True)
class View:
    """What of a video counts."""

    num_frames: int
    sample_rate: int = 1
    resolution: int | None = None  # of the shorter side
    crop: int | None = None


def find(folder: str, flag: str, limit: int | None = None) -> list[Path]:
    """Videos and images of a folder by name; hidden files are passed over."""
    from opensora_jax.data.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    if not Path(folder).is_dir():
        raise UserError(f"--{flag}={folder} is no folder")
    kinds = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in kinds and not p.name.startswith("."))
    if not found:
        raise UserError(f"--{flag}={folder} holds no videos or images")
    return found[:limit]


def read_prompts(file: str, videos: list[Path]) -> list[str]:
    """One line a video, or JSON {name: prompt}."""
    try:
        text = Path(file).read_text()
        told = json.loads(text) if file.endswith(".json") else None
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={file}: {error}") from None
    if told is None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) < len(videos):
            raise UserError(f"{file} has {len(lines)} prompts for {len(videos)} videos; give one a line")
        return lines[: len(videos)]
    missing = [path.name for path in videos if path.name not in told and path.stem not in told]
    if missing:
        raise UserError(f"{file} has no prompt for {missing[0]} (of {len(missing)} videos without one)")
    return [told.get(path.name, told.get(path.stem)) for path in videos]


def stacked(paths: list[Path], view: View) -> np.ndarray:
    """[N, T, H, W, 3] float32 in [0, 1]."""
    clips = [load(path, view) for path in paths]
    for path, clip in zip(paths, clips):
        if clip.shape != clips[0].shape:
            sizes = " and ".join(" x ".join(map(str, c.shape[:3])) for c in (clips[0], clip))
            raise UserError(f"{paths[0].name} and {path.name} are {sizes} (T x H x W); set --resolution and --crop")
    return np.stack(clips)


def load(path: Path, view: View) -> np.ndarray:
    """[T, H, W, 3] float32 in [0, 1]; an image is a video of one frame."""
    from opensora_jax.data.video_io import VideoError, probe, read_frames

    span = view.sample_rate * view.num_frames
    try:
        total = probe(path).num_frames
        if 1 < total < span:
            raise UserError(
                f"{path} has {total} frames, {view.num_frames} every {view.sample_rate} need {span}; lower --num_frames"
            )
        indices = [0] if total == 1 else np.linspace(0, span - 1, view.num_frames, dtype=int)
        frames = read_frames(path, indices=indices).astype(np.float32) / 255
    except VideoError as error:
        raise UserError(str(error)) from None
    frames = scaled(frames, view.resolution)
    height, width = frames.shape[1:3]
    if view.crop is None:
        return frames
    if min(height, width) < view.crop:
        raise UserError(f"{path}: {height} x {width} is smaller than --crop={view.crop}; set --resolution")
    top, left = (height - view.crop) // 2, (width - view.crop) // 2
    return frames[:, top : top + view.crop, left : left + view.crop]


def scaled(frames: np.ndarray, size: int | None) -> np.ndarray:
    """The shorter side to `size`, bilinear without antialiasing, as the published tables were made."""
    if size is None or min(frames.shape[1:3]) == size:
        return frames
    import jax

    height, width = frames.shape[1:3]
    shape = (math.floor(height / width * size), size) if width < height else (size, math.floor(width / height * size))
    return np.asarray(jax.image.resize(frames, (len(frames), *shape, 3), "linear", antialias=False))
