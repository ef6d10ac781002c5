"""Videos → clips without cuts: detection with PySceneDetect, cutting by exact re-encode.

    python -m data_pipelines.scene_cut --input=VIDEOS --output=WORK [--detectors=adaptive,threshold] [--shorter=720]

The detectors are driven frame by frame on our own decode, so a cut is a frame number of the file also for variable
rates. `detectors` may name several (adaptive content hash histogram threshold); their cuts are united. Threshold finds
fades: the dark frames between two scenes belong to neither. `transition_seconds` adds a second look that finds
dissolves at least that long and leaves them out. Source frames and times are kept with every clip.
"""

import collections
import dataclasses
import itertools
import sys

import numpy as np
import pyarrow as pa

from data_pipelines import entry, files
from data_pipelines.decode import Encoder, resampled, shrink, stream
from data_pipelines.probe import MEASURED
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError

DETECTORS = ("adaptive", "content", "hash", "histogram", "threshold")


class SceneCut(Stage):
    columns_in = ("source", "path", "num_frames", "fps", "variable_rate")
    columns_out = {
        "source": pa.string(),
        "path": pa.string(),
        **MEASURED,
        "start_frame": pa.int64(),
        "end_frame": pa.int64(),
        "start_seconds": pa.float64(),
        "end_seconds": pa.float64(),
        "source_path": pa.string(),
    }
    forgets = ("status", "reason", "codec", "rotation", "variable_rate", "odd_size", "audio")
    makes_rows = True
    resources = Resources(num_cpus=1)
    batch_size = 4

    @dataclasses.dataclass(frozen=True)
    class Config:
        folder: str = ""  # where clips go; the runner fills it in
        detectors: tuple[str, ...] = ("adaptive",)  # adaptive, content, hash, histogram, threshold (fades)
        adaptive_threshold: float = 3.0  # 1.1 and 1.2; 1.3 used 2.0 with min_content 10
        min_content: float = 15.0  # least change that adaptive takes for a cut
        content_threshold: float = 27.0  # of the detector content
        hash_threshold: float = 0.35  # of the detector hash
        histogram_threshold: float = 0.2  # of the detector histogram
        fade_threshold: float = 12.0  # mean brightness under which threshold sees black
        min_scene_frames: int = 8  # between two cuts
        margin_frames: int = 0  # left out on both sides of every cut; 1.3 drops one before a cut
        transition_seconds: float = 0.0  # of a gradual change to look for and leave out; 0: none
        min_seconds: float = 0.0  # shorter clips are left out
        max_seconds: float = 0.0  # 0: no limit
        too_long: str = "split"  # or truncate, as in 1.1
        shorter: int = 0  # scale the shorter side down to this; never up
        target_fps: float = 0.0  # 0: that of the source
        codec: str = "libx264"  # of the clips
        crf: int = 18  # quality: 0 loses nothing, 51 is worst
        preset: str = "medium"  # of x264: ultrafast … veryslow

    @classmethod
    def check(cls, config):
        unknown = [name for name in config.detectors if name not in DETECTORS]
        if unknown or not config.detectors:
            raise UserError(f"scene_cut.detectors: {unknown or 'none'} given; choose from {', '.join(DETECTORS)}")
        if config.too_long not in ("split", "truncate"):
            raise UserError(f"scene_cut.too_long must be split or truncate, not {config.too_long}")

    def row(self, row):
        config, fps = self.config, row["fps"] or 24.0
        times, spans = scenes(row["path"], fps, config)
        spans = limited(spans, times, fps, config)
        return list(self.encode(row, spans, times, fps))

    def encode(self, row, spans, times, fps):
        """One pass over the source; the frames of each span go to its own file."""
        config = self.config
        frames = enumerate(stream(row["path"]))
        rate = config.target_fps or fps
        for start, end in spans:
            name = files.digest(row["id"], start, end)
            path = files.join(config.folder, name[:2], f"{name}.mp4")
            timed = ((seconds - times[start], image) for seconds, image in window(frames, start, end))
            constant = config.target_fps or row["variable_rate"]
            images = resampled(timed, rate) if constant else (image for _, image in timed)
            with files.replacing(path) as local:
                with Encoder(local, rate, codec=config.codec, crf=config.crf, preset=config.preset) as encoder:
                    for image in images:
                        encoder.add(shrink(image, config.shorter))
                facts = encoder.facts(files.size(local))
            yield {
                "id": name,
                "source": row["source"],
                "path": path,
                "start_frame": start,
                "end_frame": end,
                "start_seconds": times[start],
                "end_seconds": times[end - 1] + 1 / fps,
                "source_path": row["path"],
                **facts,
            }


def window(frames, start: int, end: int):
    """The frames start … end − 1 of an enumerated stream, leaving it behind the last."""
    for number, frame in frames:
        if number >= start:
            yield frame
        if number == end - 1:
            return


def scenes(path: str, fps: float, config) -> tuple[list[float], list[tuple[int, int]]]:
    """(time of every frame, spans of frames without a cut)."""
    import cv2
    from scenedetect import FrameTimecode

    detectors = [(name, detector(name, config)) for name in config.detectors]
    cuts: set[int] = set()
    dark: set[int] = set()
    gaps = Gradual(fps, config)
    times: list[float] = []
    for number, (seconds, image) in enumerate(stream(path, longer=256)):
        times.append(seconds)
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        code = FrameTimecode(number, fps)
        for _, one in detectors:
            cuts.update(found.frame_num for found in one.process_frame(code, bgr))
        if "threshold" in config.detectors and bgr.mean() < config.fade_threshold:
            dark.add(number)
        gaps.see(number, bgr)
    for _, one in detectors:
        cuts.update(found.frame_num for found in one.post_process(FrameTimecode(max(len(times) - 1, 0), fps)))
    edges = [0, *sorted(c for c in cuts if 0 < c < len(times)), len(times)]
    spans = []
    for start, end in itertools.pairwise(edges):
        spans.extend(without(start, end, dark if len(dark) < len(times) else set(), gaps.spans()))
    margin = config.margin_frames
    inner = [(a + margin * (a > 0), b - margin * (b < len(times))) for a, b in spans]
    return times, [(a, b) for a, b in inner if b > a]


def without(start: int, end: int, dark: set[int], gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A scene less the dark frames at its ends and less the gradual transitions inside it."""
    while start < end and start in dark:
        start += 1
    while end > start and end - 1 in dark:
        end -= 1
    spans = []
    for a, b in gaps:
        if start < b and a < end:
            if a > start:
                spans.append((start, a))
            start = min(b, end)
    return [*spans, (start, end)] if end > start else spans


class Gradual:
    """The second pass: in a dissolve the frames between two moments are mixtures of those two, in the proportion of time;
    in a moving picture they are not, unless it moves so little that the two are still alike. Looks at thumbnails
    `transition_seconds` apart and at the three between them.
    """

    def __init__(self, fps: float, config, most_alike: float = 0.75, most_misfit: float = 0.25):
        self.length = round(config.transition_seconds * fps / 4) * 4
        self.most_alike, self.most_misfit = most_alike, most_misfit
        self.recent: collections.deque = collections.deque(maxlen=self.length + 1)
        self.found: set[int] = set()

    def see(self, number: int, bgr) -> None:
        if not self.length:
            return
        import cv2

        self.recent.append(cv2.resize(bgr, (24, 16), interpolation=cv2.INTER_AREA).astype(np.float32).ravel())
        if len(self.recent) <= self.length:
            return
        first, last = self.recent[0], self.recent[-1]
        change = np.abs(last - first).mean()
        if min(first.std(), last.std()) < 4 or np.corrcoef(first, last)[0, 1] > self.most_alike:
            return
        shares = ((k / 4, self.recent[k * self.length // 4]) for k in (1, 2, 3))
        misfit = max(np.abs(seen - (1 - share) * first - share * last).mean() for share, seen in shares)
        if misfit < self.most_misfit * change:
            self.found.update(range(number - self.length, number + 1))

    def spans(self) -> list[tuple[int, int]]:
        """Runs of frames inside transitions."""
        spans: list[tuple[int, int]] = []
        for number in sorted(self.found):
            if spans and spans[-1][1] == number:
                spans[-1] = (spans[-1][0], number + 1)
            else:
                spans.append((number, number + 1))
        return spans


class Adaptive:
    """PySceneDetect's AdaptiveDetector (a change counts when it stands out from the two before and the two after), but
    frames that repeat the one before, as clips of variable rate have when made constant, are not among those four:
    beside their zeros every step of a moving picture would stand out. A still held as long as a scene is no repeat.
    """

    repeat = 0.15  # of the change in question: below it a frame repeats the one before

    def __init__(self, config):
        from scenedetect import ContentDetector

        self.config = config
        self.content = ContentDetector(threshold=255.0, min_scene_len=0)
        self.changes: list[float] = []

    def process_frame(self, code, image) -> list:
        self.content.process_frame(code, image)
        self.changes.append(self.content._frame_score or 0.0)
        return []

    def post_process(self, code) -> list:
        config, changes, cuts = self.config, self.changes, [0]
        for number in range(2, len(changes) - 2):
            change = changes[number]
            if change < config.min_content or number - cuts[-1] < config.min_scene_frames:
                continue
            beside = [*self.beside(number, -1), *self.beside(number, 1)]
            usual = sum(beside) / len(beside) if beside else 0.0
            if change >= config.adaptive_threshold * usual:
                cuts.append(number)
        return [code + (number - code.frame_num) for number in cuts[1:]]

    def beside(self, number: int, step: int) -> list[float]:
        """The two changes next to this one, repeats left out: zeros where the picture stands still, fewer at an end."""
        found, gap, place = [], 0, number + step
        while 0 < place < len(self.changes) and len(found) < 2:
            repeats = self.changes[place] < self.repeat * self.changes[number]
            gap = gap + 1 if repeats else 0
            if gap == self.config.min_scene_frames:
                return [*found, 0.0, 0.0][:2]
            found += [] if repeats else [self.changes[place]]
            place += step
        return found


def detector(name: str, config):
    from scenedetect import ContentDetector, HashDetector, HistogramDetector, ThresholdDetector

    least = config.min_scene_frames
    if name == "adaptive":
        return Adaptive(config)
    if name == "content":
        return ContentDetector(config.content_threshold, min_scene_len=least)
    if name == "hash":
        return HashDetector(config.hash_threshold, min_scene_len=least)
    if name == "histogram":
        return HistogramDetector(config.histogram_threshold, min_scene_len=least)
    return ThresholdDetector(config.fade_threshold, min_scene_len=least)


def limited(spans, times, fps, config) -> list[tuple[int, int]]:
    """Scenes longer than max_seconds are split evenly or truncated; what is shorter than min_seconds goes."""
    kept = []
    for start, end in spans:
        length = times[end - 1] - times[start] + 1 / fps
        pieces = 1
        if config.max_seconds and length > config.max_seconds + 1e-6:
            if config.too_long == "truncate":
                limit = times[start] + config.max_seconds - 1e-6
                end = next(k for k in range(start, end) if times[k] >= limit - 0.5 / fps)
            else:
                pieces = int(-(-length // config.max_seconds))
        edges = [start + (end - start) * k // pieces for k in range(pieces + 1)]
        kept.extend(itertools.pairwise(edges))
    return [(a, b) for a, b in kept if b > a and times[b - 1] - times[a] + 1 / fps >= config.min_seconds - 1e-6]


STAGE = SceneCut

if __name__ == "__main__":
    sys.exit(entry.stage(SceneCut))
