"""A small corpus of videos with known truth: to try the pipeline on, to test it, and to measure it.

    python -m data_pipelines.synthetic --output=VIDEOS [--plain=200]

Writes hard cuts, fades, camera moves, text, near-duplicates, frozen and black clips, letterbox, odd sides, rotation,
variable rate, one frame, audio only, truncated and broken files, and truth.json: what a perfect pipeline would say of
each. `--plain=N` adds N ordinary one-second clips of 64×64.
"""

import argparse
import json
import os
import sys
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from data_pipelines.decode import Encoder
from opensora_jax.common.errors import guarded

HEIGHT, WIDTH, FPS = 120, 160, 24


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """Coloured noise of several scales: enough detail for optical flow, distinct for every seed."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cell, weight in ((32, 90), (12, 50), (5, 25)):
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        total += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    total += rng.uniform(80, 170, size=3).astype(np.float32)
    return np.clip(total, 0, 255).astype(np.uint8)


def scene(
    seed: int, frames: int, *, pan=(0.0, 0.0), zoom: float = 1.0, size=(HEIGHT, WIDTH), disc: bool = False
) -> Iterator[np.ndarray]:
    """A camera over a texture: `pan` is (x, y) pixels a frame of camera travel, `zoom` the magnification a frame."""
    height, width = size
    margin = int(frames * max(map(abs, pan))) + 8
    canvas = texture(seed, height + 2 * margin, width + 2 * margin)
    centre = np.array([canvas.shape[1] / 2, canvas.shape[0] / 2])
    start = centre - np.array(pan) * (frames - 1) / 2
    for t in range(frames):
        scale = 1 / zoom**t
        x, y = start + np.array(pan) * t
        view = np.float32([[scale, 0, x - scale * width / 2], [0, scale, y - scale * height / 2]])
        image = cv2.warpAffine(canvas, view, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        if disc:
            cv2.circle(image, (int(width * (0.2 + 0.6 * t / frames)), height // 2), height // 8, (255, 240, 30), -1)
        yield image


def written(path: str, frames: Iterable[np.ndarray], fps: float = FPS, crf: int = 12) -> None:
    with Encoder(path, fps, crf=crf, preset="ultrafast") as encoder:
        for image in frames:
            encoder.add(image)


def faded(frames: list[np.ndarray], into: int, out: int) -> list[np.ndarray]:
    count = len(frames)
    level = [min(1.0, (t + 1) / into if into else 1, (count - t) / out if out else 1) for t in range(count)]
    return [(image * k).astype(np.uint8) for image, k in zip(frames, level)]


def captioned(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for image in frames:
        image = image.copy()
        cv2.rectangle(image, (4, 40), (156, 84), (10, 10, 10), -1)
        cv2.putText(image, "BREAKING", (8, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255, 255, 255), 2, cv2.LINE_AA)
        cv2.putText(image, "NEWS 2024", (8, 80), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 2, cv2.LINE_AA)
        yield image


def letterboxed(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for image in frames:
        image = image.copy()
        image[:18] = image[-18:] = 0
        yield image


def odd(path: str) -> None:
    """121×161, which 4:2:0 cannot hold: 4:4:4."""
    with av.open(path, "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"crf": "12"})
        video.width, video.height, video.pix_fmt = WIDTH + 1, HEIGHT + 1, "yuv444p"
        for image in scene(21, 30, pan=(1.5, 0), size=(HEIGHT + 1, WIDTH + 1)):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))


def variable_rate(path: str) -> None:
    """Every fourth frame is shown three times as long."""
    with av.open(path, "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"crf": "12"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.codec_context.time_base = Fraction(1, FPS)
        due = 0
        for t, image in enumerate(scene(22, 32, pan=(1.5, 0))):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = due, Fraction(1, FPS)
            due += 3 if t % 4 == 3 else 1
            out.mux(video.encode(frame))
        out.mux(video.encode(None))


def rotated(path: str, upright: str) -> None:
    """The same stream with a display matrix of a quarter turn in its track header."""
    data = bytearray(Path(upright).read_bytes())
    place = data.index(b"tkhd") + 4
    matrix = place + (4 + 8 + 8 + 4 + 4 + 8 if data[place] == 1 else 4 + 4 + 4 + 4 + 4 + 4) + 8 + 8
    one = (1 << 16).to_bytes(4, "big")
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero = bytes(4)
    data[matrix : matrix + 36] = b"".join(
        [zero, one, zero, minus, zero, zero, zero, zero, (1 << 30).to_bytes(4, "big")]
    )
    Path(path).write_bytes(data)


def audio_only(path: str) -> None:
    with wave.open(path + ".wav", "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes((3000 * np.sin(np.arange(16000) / 8)).astype("<i2").tobytes())
    with av.open(path + ".wav") as source, av.open(path, "w") as out:
        audio = out.add_stream("aac", rate=16000)
        for frame in source.decode(audio=0):
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    os.unlink(path + ".wav")


def truncated(path: str, whole: str) -> None:
    """The index is at the front and promises frames that are no longer there."""
    data = Path(whole).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * 0.6)])


def corpus(folder: str) -> dict[str, dict]:
    """Writes the corpus and returns its truth."""
    os.makedirs(folder, exist_ok=True)
    at = lambda name: os.path.join(folder, name)
    truth: dict[str, dict] = {}

    def clip(name: str, frames: Iterable[np.ndarray], crf: int = 12, **facts) -> None:
        frames = list(frames)
        written(at(name), frames, crf=crf)
        truth[name] = {"status": "ok", "num_frames": len(frames), "cuts": [], "good": True, **facts}

    clip(
        "cuts_a.mp4", [*scene(1, 30, pan=(1, 0)), *scene(2, 43, pan=(0, 1)), *scene(3, 27, pan=(-1, 0))], cuts=[30, 73]
    )
    clip("cuts_b.mp4", [*scene(4, 25, disc=True, pan=(1, 0)), *scene(5, 50, pan=(1, 1))], cuts=[25])
    fade = faded(list(scene(6, 40, pan=(1, 0))), 0, 10) + [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 6
    clip("fade.mp4", fade + faded(list(scene(7, 40, pan=(0, 1))), 10, 0), cuts=[43], fade=(40, 46))
    moves = {
        "pan_right": {"pan": (2, 0)},
        "pan_left": {"pan": (-2, 0)},
        "tilt_up": {"pan": (0, -1.5)},
        "tilt_down": {"pan": (0, 1.5)},
        "zoom_in": {"zoom": 1.012},
        "zoom_out": {"zoom": 1 / 1.012},
    }
    for seed, (name, move) in enumerate(moves.items(), 8):
        clip(f"{name}.mp4", scene(seed, 36, **move), cmotion=name.replace("_", " "))
        Path(at(f"{name}.txt")).write_text(
            f"The video shows a coloured texture while the camera does a {name[:4].strip('_')}"
        )
    clip("disc.mp4", scene(14, 36, disc=True), cmotion="static")
    clip("frozen.mp4", scene(15, 36), cmotion="static", good=False, why="frozen")
    clip("black.mp4", [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 36, good=False, why="black")
    clip("letterbox.mp4", letterboxed(scene(16, 36, pan=(2, 0))), good=False, why="letterbox")
    clip("text.mp4", captioned(scene(17, 36, pan=(1.5, 0))), good=False, why="text")
    clip("twin_one.mp4", scene(18, 36, pan=(1.5, 0.5)))
    dim = [np.clip(f * 0.93 + 6, 0, 255).astype(np.uint8) for f in scene(18, 36, pan=(1.5, 0.5))]
    clip("twin_two.mp4", [cv2.resize(f, (128, 96)) for f in dim], crf=26, good=False, why="duplicate")
    written(at("one_frame.mp4"), scene(19, 1))
    truth["one_frame.mp4"] = {"status": "one_frame", "num_frames": 1, "good": False}
    odd(at("odd.mkv"))
    truth["odd.mkv"] = {"status": "ok", "num_frames": 30, "cuts": [], "good": True, "odd_size": True}
    variable_rate(at("variable.mp4"))
    truth["variable.mp4"] = {"status": "ok", "num_frames": 32, "cuts": [], "good": True, "variable_rate": True}
    written(at("whole.mp4"), scene(23, 36, pan=(0, 1.5)))
    rotated(at("rotated.mp4"), at("whole.mp4"))
    truth["rotated.mp4"] = {"status": "ok", "num_frames": 36, "cuts": [], "good": True, "rotation": 270}
    truncated(at("truncated.mp4"), at("whole.mp4"))
    truth["truncated.mp4"] = {"status": "truncated", "good": False}
    os.unlink(at("whole.mp4"))
    audio_only(at("sound.mp4"))
    truth["sound.mp4"] = {"status": "no_video", "good": False}
    Path(at("noise.mp4")).write_bytes(np.random.default_rng(0).bytes(4096))
    Path(at("empty.mp4")).touch()
    truth |= {name: {"status": "broken", "good": False} for name in ("noise.mp4", "empty.mp4")}
    with open(at("truth.json"), "w") as handle:
        json.dump(truth, handle, indent=1)
    return truth


def plain(folder: str, count: int, first: int = 0) -> None:
    """Ordinary clips of one second, 64×64: a small number of moves over textures of their own."""
    os.makedirs(folder, exist_ok=True)
    for k in range(first, first + count):
        angle = 2 * np.pi * k / 17
        frames = scene(1000 + k, FPS, pan=(1.5 * np.cos(angle), 1.5 * np.sin(angle)), size=(64, 64))
        written(os.path.join(folder, f"plain_{k:05d}.mp4"), frames, crf=18)


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python -m data_pipelines.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--output", metavar="DIR", required=True, help="folder for the videos")
    flags.add_argument("--plain", metavar="N", type=int, default=0, help="ordinary clips beside the special ones")
    args = flags.parse_args()
    truth = corpus(args.output)
    plain(args.output, args.plain)
    print(f"{len(truth) + args.plain} files in {args.output}")


if __name__ == "__main__":
    sys.exit(guarded(main))
