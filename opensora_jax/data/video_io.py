"""Video files in and out, through PyAV: probe, exact reads, mp4 and gif.

Decoders here use one thread: a loader decodes many clips at once, and the threads of one clip would only fight those of
the next. Encoding is single-threaded too, because libx264's output depends on its thread count and shards must come out
identical on every machine. Arrays are [T, H, W, 3] uint8 throughout.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif")
Size = tuple[int, int] | Callable[[int, int], tuple[int, int]] | None
SMALL = 128  # pixels
SEEK_FROM_FRAME = 64  # below this, decoding from the start is cheaper than listing packets and seeking


class VideoError(ValueError):
    """A file that cannot be decoded as asked; loaders skip and count it, entries turn it into a UserError."""


@dataclass(frozen=True)
class VideoInfo:
    num_frames: int
    height: int
    width: int
    fps: float
    duration_seconds: float
    codec: str


def probe(source: str | Path | bytes) -> VideoInfo:
    """Size as displayed (rotation applied), exact frame count and rate; raises VideoError for what is no video."""
    if is_image(source):
        height, width = _read_image(source).shape[:2]
        return VideoInfo(1, height, width, 0.0, 0.0, "image")
    with _opened(source) as (container, stream):
        first = next(_decoded(container, stream), None)
        if first is None:
            raise VideoError(f"{_name(source)}: no frame can be decoded")
        turned = getattr(first, "rotation", 0) % 180 == 90
        height, width = (first.width, first.height) if turned else (first.height, first.width)
        fps = float(stream.average_rate or stream.base_rate or 0)
        frames = stream.frames or len(_packet_times(source))
        seconds = float(stream.duration * stream.time_base) if stream.duration else frames / fps if fps else 0.0
        return VideoInfo(frames, height, width, fps, seconds, stream.codec_context.name)


def read_frames(
    source: str | Path | bytes,
    *,
    indices: Sequence[int] | None = None,
    start: int = 0,
    stride: int = 1,
    num: int | None = None,
    size: Size = None,
) -> np.ndarray:
    """The frames at `indices` (rising, repeats allowed), or `num` frames from `start` every `stride`; all without either.

    `size` (height, width), or a function from the clip's own to that, scales inside the decoder's colour conversion,
    which is much cheaper than scaling afterwards.
    """
    if is_image(source):
        frames = _read_image(source)[None]
        return resize(frames, size(*frames.shape[1:3]) if callable(size) else size) if size else frames
    if indices is None and num is not None:
        indices = range(start, start + stride * num, stride)
    if indices is None:
        return _read_rest(source, start, stride, size)
    wanted = np.asarray(indices, int)
    if wanted.size == 0 or wanted[0] < 0 or np.any(np.diff(wanted) < 0):
        raise VideoError(f"{_name(source)}: frame indices must be rising and not negative, got {wanted[:8].tolist()}")
    out, filled, picture = None, 0, Picture()
    with _opened(source) as (container, stream):
        for index, frame in _numbered(source, container, stream, int(wanted[0])):
            if index < wanted[filled]:
                continue
            pixels = picture(frame, size)
            if out is None:
                out = np.empty((len(wanted), *pixels.shape), np.uint8)
            while filled < len(wanted) and wanted[filled] == index:
                out[filled] = pixels
                filled += 1
            if filled == len(wanted):
                return out
    raise VideoError(f"{_name(source)}: asked for frame {wanted[filled]}, but the file ends before it")


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[T, H, W, 3] uint8 to another (height, width): bicubic, antialiased when shrinking, the decoder's own scaler."""
    import av

    if frames.shape[1:3] == tuple(size):
        return frames
    out, picture = np.empty((len(frames), *size, 3), np.uint8), Picture()
    for index, frame in enumerate(frames):
        out[index] = picture(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"), size)
    return out


def write_video(
    path: str | os.PathLike | io.IOBase,
    frames: np.ndarray,
    fps: float,
    *,
    codec: str = "libx264",
    crf: int = 18,
    pix_fmt: str = "",
) -> None:
    """Writes [T, H, W, 3] uint8; an odd height or width is made even by repeating its last line, as h264 demands.

    pix_fmt: yuv420p, which every player takes; below SMALL pixels yuv444p, since colour at half size would blur shapes.
    """
    from fractions import Fraction

    import av

    if "://" in str(path):  # an object store takes whole files
        remote(path).write_bytes(encode_video(frames, fps, codec=codec, crf=crf, pix_fmt=pix_fmt))
        return
    frames = _even(check_frames(frames))
    if not pix_fmt:
        small = min(frames.shape[1:3]) < SMALL and codec.startswith("libx26")
        pix_fmt = "yuv444p" if small else "yuv420p"
    target = str(path) if isinstance(path, str | os.PathLike) else path
    options = {"crf": str(crf)} if codec.startswith(("libx26", "libsvt", "libvpx")) else {}
    if codec == "libx265":
        options["x265-params"] = "log-level=none"
    if codec == "libx264" and frames.shape[2] < 128:
        # Its macroblock tree reads past rows this short, and the file would differ from call to call (libx264 165).
        options["x264-params"] = "mbtree=0"
    kind = None if isinstance(target, str) else "mp4"
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def encode_video(frames: np.ndarray, fps: float, **options) -> bytes:
    """`write_video` into memory."""
    buffer = io.BytesIO()
    write_video(buffer, frames, fps, **options)
    return buffer.getvalue()


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
    """An endlessly looping gif; times are whole hundredths of a second, which is all that gif can say."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in check_frames(frames)]
    milliseconds = max(20, round(100 / fps) * 10)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    remote(path).write_bytes(buffer.getvalue())


def remote(path):
    """A path that may lie in an object store."""
    from etils import epath

    return epath.Path(path)


def check_frames(frames: np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"a video to write must be [T, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
    return frames


def is_image(source: str | Path | bytes) -> bool:
    if isinstance(source, bytes | memoryview):
        head = bytes(source[:12])
        return head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"BM")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
    return str(source).lower().endswith(IMAGE_SUFFIXES)


def _read_image(source: str | Path | bytes) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes | memoryview) else source) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"{_name(source)}: not a readable image ({error})") from None


def _read_rest(source, start, stride, size):
    """Every frame from `start`; the array grows by doubling, so that no list of frames is ever held (their buffers leak)."""
    out, filled, picture = None, 0, Picture()
    with _opened(source) as (container, stream):
        for index, frame in _numbered(source, container, stream, start):
            if index < start or (index - start) % stride:
                continue
            pixels = picture(frame, size)
            if out is None:
                out = np.empty((max(16, (stream.frames - start) // stride + 1), *pixels.shape), np.uint8)
            elif filled == len(out):
                out = np.concatenate([out, np.empty_like(out)])
            out[filled] = pixels
            filled += 1
    if out is None:
        raise VideoError(f"{_name(source)}: no frame can be decoded from frame {start} on")
    return out[:filled]


class _opened:
    """The container and its first video stream; whatever goes wrong inside becomes a VideoError that names the file."""

    def __init__(self, source):
        self.source = source
        self.container = None

    def __enter__(self):
        import av

        target = io.BytesIO(self.source) if isinstance(self.source, bytes | memoryview) else str(self.source)
        try:
            self.container = av.open(target)
        except (OSError, ValueError) as error:
            raise VideoError(f"{_name(self.source)}: cannot be opened as video ({_reason(error)})") from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoError(f"{_name(self.source)}: has no video stream")
        stream = self.container.streams.video[0]
        stream.codec_context.thread_count = 1
        return self.container, stream

    def __exit__(self, kind, error, trace):
        import av

        self.container.close()
        if isinstance(error, av.FFmpegError | OSError):
            raise VideoError(f"{_name(self.source)}: broken video data ({_reason(error)})") from None


def _decoded(container, stream):
    yield from container.decode(stream)


def _numbered(source, container, stream, first: int):
    """(index, frame) in display order; seeks when `first` lies deep in the file, exact for variable frame rates too."""
    if first < SEEK_FROM_FRAME:
        yield from enumerate(_decoded(container, stream))
        return
    times = _packet_times(source)
    if first >= len(times):
        return
    index_of = {time: index for index, time in enumerate(times)}
    container.seek(times[first], stream=stream, backward=True, any_frame=False)
    for frame in _decoded(container, stream):
        if frame.pts in index_of:
            yield index_of[frame.pts], frame


def _packet_times(source) -> list[int]:
    """Presentation times of all frames, from the packets alone (nothing is decoded)."""
    with _opened(source) as (container, stream):
        return sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)


class Picture:
    """Turns the decoded frames of one stream into RGB as displayed: scaled, converted and upright.

    One scaler, on one thread, serves them all. Left to itself PyAV makes a scaler a frame with a thread a core, which
    took a 64x64 frame three times as long as decoding it (on two cores, 2026-11-28; more on more).
    """

    def __init__(self, interpolation: str = "BICUBIC"):
        from av.video.reformatter import VideoReformatter

        self.scaler, self.interpolation = VideoReformatter(), interpolation

    def __call__(self, frame, size: Size = None) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        size = (size(height, width) if callable(size) else size) or (height, width)
        height, width = size[::-1] if turns % 2 else size
        scaled = {} if (height, width) == (frame.height, frame.width) else {"interpolation": self.interpolation}
        pixels = self.scaler.reformat(frame, width, height, "rgb24", threads=1, **scaled).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _even(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    if height % 2 == 0 and width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _name(source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes | memoryview) else str(source)


def _reason(error) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).split("\n")[0]
