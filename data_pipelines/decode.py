"""Frames in and out of video files (PyAV): a stream with bounded memory, a few frames by number, an exact encoder.

Random access and probing live in opensora_jax.data.video_io; this file adds what curation needs beside it: one pass
over a long file that never holds more than a frame, and an encoder that is fed frame by frame. Both use one thread,
because the runners already work on as many files as there are cores, and because one thread makes the bytes
reproducible.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

from data_pipelines import files
from opensora_jax.data import video_io


def stream(path: str, *, longer: int | None = None, size: tuple[int, int] | None = None) -> Iterator[tuple]:
    """Yields (seconds since the first frame, RGB frame [H, W, 3]) in display order, turned upright.

    `longer` scales so that the longer side has that many pixels (never up); `size` is an exact (height, width).
    """
    wanted = size or (lambda height, width: fitted(height, width, longer))
    with files.fetched(path) as local, av.open(local) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        first, picture = None, video_io.Picture("AREA")
        for number, frame in enumerate(container.decode(video)):
            seconds = frame.time if frame.time is not None else number / float(video.average_rate or 24)
            first = seconds if first is None else first
            yield seconds - first, picture(frame, wanted)


def frames_at(path: str, numbers: Sequence[int], *, longer: int | None = None, size=None) -> np.ndarray:
    """The frames with these rising numbers [N, H, W, 3], scaled as `stream` does; an error where the file is too short."""
    with files.fetched(path) as local:
        return video_io.read_frames(local, indices=numbers, size=size or (lambda h, w: fitted(h, w, longer)))


def fitted(height: int, width: int, longer: int | None) -> tuple[int, int]:
    """The size at which the longer side has at most that many pixels."""
    scale = min(1.0, longer / max(height, width)) if longer else 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))


def spread(total: int, count: int) -> list[int]:
    """`count` frame numbers at the middles of equal parts of a clip; fewer when the clip is shorter."""
    count = min(count, total)
    return [int((k + 0.5) * total / count) for k in range(count)]


class Encoder:
    """Writes frames one by one. Sides are cut to even numbers, as 4:2:0 wants; bytes depend only on the frames."""

    def __init__(self, path: str, fps: float, *, codec: str = "libx264", crf: int = 18, preset: str = "medium"):
        self.container = av.open(path, "w", format="mp4", options={"movflags": "+faststart"})
        self.rate = Fraction(fps).limit_denominator(60060)
        options = {"crf": str(crf), "preset": preset}
        if codec == "libx264":
            # x264's macroblock tree gives other bytes each time memory is reused (seen with PyAV 18, 2026-11-21).
            options["x264-params"] = "mbtree=0"
        self.settings = codec, options
        self.stream = None
        self.count, self.shape = 0, (0, 0)

    def add(self, image: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in image.shape[:2])
        if self.stream is None:
            codec, options = self.settings
            self.stream = self.container.add_stream(codec, rate=self.rate, options=options)
            self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
            self.stream.codec_context.thread_count = 1
            self.shape = height, width
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        frame.pts, frame.time_base = self.count, 1 / self.rate
        self.container.mux(self.stream.encode(frame))
        self.count += 1

    def facts(self, filesize: int) -> dict:
        """The measured columns of the file that was written."""
        (height, width), rate = self.shape, float(self.rate)
        return {
            "num_frames": self.count,
            "height": height,
            "width": width,
            "aspect_ratio": height / width,
            "resolution": height * width,
            "fps": rate,
            "seconds": self.count / rate,
            "filesize": filesize,
        }

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind, *rest) -> None:
        if self.stream is not None and kind is None:
            self.container.mux(self.stream.encode(None))
        self.container.close()


def resampled(timed: Iterator[tuple], fps: float) -> Iterator[np.ndarray]:
    """A constant rate out of (seconds, frame): frame k shows what was on screen at k / fps."""
    shown, due = None, 0
    for seconds, image in timed:
        while shown is not None and due / fps < seconds - 1e-6:
            yield shown
            due += 1
        shown = image
    if shown is not None:
        yield shown


def shrink(image: np.ndarray, shorter: int | None) -> np.ndarray:
    """Scales so that the shorter side has `shorter` pixels; never enlarges."""
    import cv2

    height, width = image.shape[:2]
    if not shorter or min(height, width) <= shorter:
        return image
    scale = shorter / min(height, width)
    return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
