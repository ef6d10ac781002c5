"""What each file is and whether it can be used: one row a file, a status instead of a surprise later.

    python -m data_pipelines.probe --input=VIDEOS --output=WORK

`status` is ok, or the first thing wrong: broken (cannot be opened), no_video (audio only), truncated (fewer frames than
the container declares, or the last cannot be decoded), one_frame (a still in a video container). Stills (.jpg, .png …)
are ok with one frame. Variable rates, rotation and odd sides are no faults; they are columns, and scene_cut and resize
put them right. Width and height are as displayed, after rotation.
"""

import dataclasses
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa

from data_pipelines import entry, files
from data_pipelines.stage import Resources, Stage
from opensora_jax.data.video_io import Picture

MEASURED = {
    "num_frames": pa.int64(),
    "width": pa.int64(),
    "height": pa.int64(),
    "aspect_ratio": pa.float64(),  # height / width, as in the originals
    "resolution": pa.int64(),
    "fps": pa.float64(),
    "seconds": pa.float64(),
    "filesize": pa.int64(),
}


class Probe(Stage):
    columns_in = ("path",)
    columns_out = {
        "status": pa.string(),
        "reason": pa.string(),
        **MEASURED,
        "codec": pa.string(),
        "rotation": pa.int64(),
        "variable_rate": pa.bool_(),
        "odd_size": pa.bool_(),
        "audio": pa.bool_(),
    }
    resources = Resources(num_cpus=0.5)
    batch_size = 32

    @dataclasses.dataclass(frozen=True)
    class Config:
        decode: str = "ends"  # ends: first and last second are decoded; all: every frame; none: container only

    def row(self, row):
        path = row["path"]
        if not files.exists(path):
            return {"status": "broken", "reason": "no such file"}
        size = files.size(path)
        with files.fetched(path) as local:
            try:
                return {"filesize": size, **examine(local, self.config.decode)}
            except (av.FFmpegError, OSError, ValueError, IndexError) as error:
                return {"filesize": size, "status": "broken", "reason": str(error).replace(local, path)[:200]}


def examine(path: str, decode: str) -> dict:
    with av.open(path) as container:
        if not container.streams.video:
            audio = bool(container.streams.audio)
            return {"status": "no_video", "reason": "audio only" if audio else "no stream", "audio": audio}
        video = container.streams.video[0]
        found = {"codec": video.codec_context.name, "audio": bool(container.streams.audio)}
        if Path(path).suffix.lower() in files.IMAGE_SUFFIXES:
            image = Picture()(next(container.decode(video)))
            return found | shape(*image.shape[:2], 0) | {"status": "ok", "num_frames": 1, "fps": None, "seconds": None}
        declared = video.frames
        rate = float(video.average_rate or video.guessed_rate or 0) or None
        times = packet_times(container, video)
    seconds, variable = timing(times, rate)
    if times and len(times) > 1 and seconds:
        rate = len(times) / seconds if variable or rate is None else rate
    status, reason, first = check(path, len(times), declared, decode)
    if first is None:
        return found | {"status": status, "reason": reason, "num_frames": len(times)}
    turned = round(first.rotation) % 360
    height, width = (first.width, first.height) if turned in (90, 270) else (first.height, first.width)
    return (
        found
        | shape(height, width, turned)
        | {
            "status": status,
            "reason": reason,
            "num_frames": len(times),
            "fps": rate,
            "seconds": seconds,
            "variable_rate": variable,
        }
    )


def shape(height: int, width: int, rotation: int) -> dict:
    return {
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
        "rotation": rotation,
        "odd_size": bool(height % 2 or width % 2),
    }


def packet_times(container, video) -> list[float]:
    """Presentation times of all frames in seconds, from the packets alone: no decoding, exact for every container."""
    return sorted(float(p.pts * p.time_base) for p in container.demux(video) if p.pts is not None and p.size)


def timing(times: list[float], rate: float | None) -> tuple[float | None, bool]:
    """Length in seconds, and whether the gaps between frames differ by more than container rounding explains."""
    if len(times) < 2:
        return (len(times) / rate if rate else None), False
    gaps = np.diff(times)
    usual = float(np.median(gaps))
    seconds = times[-1] - times[0] + usual
    variable = bool(np.mean(np.abs(gaps - usual) > max(0.1 * usual, 2e-3)) > 0.02)
    return seconds, variable


def check(path: str, found: int, declared: int, decode: str):
    """(status, reason, a decoded frame or None). A file that lost its end lacks packets or fails to decode them."""
    with av.open(path) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        if found == 0:
            return "broken", "no frames", None
        decoded, first = 0, None
        try:
            for frame in container.decode(video):
                first = first or frame
                decoded += 1
                if decode != "all":
                    break
            if decode == "ends":
                last_frame(container, video)
        except (av.FFmpegError, EOFError) as error:
            return ("truncated" if first else "broken"), f"decoding failed: {error}"[:200], first
    if first is None:
        return "broken", "no frame can be decoded", None
    if declared and found < declared:
        return "truncated", f"{found} of {declared} frames", first
    if decode == "all" and decoded < found:
        return "truncated", f"{decoded} of {found} frames can be decoded", first
    if found == 1:
        return "one_frame", None, first
    return "ok", None, first


def last_frame(container, video) -> None:
    """Decodes from the last key frame on; an error there means the end is missing."""
    if video.duration:
        container.seek((video.start_time or 0) + video.duration, stream=video, backward=True)
        for _ in container.decode(video):
            pass


STAGE = Probe

if __name__ == "__main__":
    sys.exit(entry.stage(Probe))
