"""Every detector, gradual transitions, margins and length limits."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines import synthetic
from data_pipelines.decode import Encoder
from data_pipelines.scene_cut import DETECTORS, STAGE, limited, scenes, without
from opensora_jax.common.errors import UserError


def config(**options):
    return STAGE.Config(folder="", **options)


@pytest.mark.parametrize("name", DETECTORS[:4])
def test_each_detector_finds_hard_cuts_exactly(name, corpus):
    for file, edges in (("cuts_a.mp4", [0, 30, 73, 100]), ("cuts_b.mp4", [0, 25, 75])):
        _, spans = scenes(os.path.join(corpus[0], file), 24.0, config(detectors=(name,), histogram_threshold=0.05))
        assert [a for a, _ in spans] + [spans[-1][1]] == edges


def test_a_dissolve_is_left_out(tmp_path):
    first = list(synthetic.scene(31, 40, pan=(0.5, 0)))
    second = list(synthetic.scene(32, 40, pan=(0, 0.5)))
    mixed = [((1 - k / 13) * a + k / 13 * b).astype(np.uint8) for k, (a, b) in enumerate(zip(first[28:], second), 1)]
    path = str(tmp_path / "dissolve.mp4")
    synthetic.written(path, [*first[:28], *mixed, *second[12:]])
    _, spans = scenes(path, 24.0, config())
    assert spans == [(0, 68)], "from frame to frame nothing is to be seen"
    _, spans = scenes(path, 24.0, config(transition_seconds=0.5))
    (a, b), (c, d) = spans
    assert (a, d) == (0, 68) and 24 <= b <= 28 and 40 <= c <= 44, "the dissolve 28 … 40 is in no scene"


@pytest.mark.parametrize("name", ["pan_right", "zoom_in", "disc"])
def test_moving_pictures_are_no_dissolves(name, corpus):
    _, spans = scenes(os.path.join(corpus[0], f"{name}.mp4"), 24.0, config(transition_seconds=0.5))
    assert spans == [(0, 36)]


def repeated(images, pattern):
    """Frame k of a moving picture is shown pattern[k % len(pattern)] times, as when a variable rate is made constant."""
    return [image for k, image in enumerate(images) for _ in range(pattern[k % len(pattern)])]


@pytest.mark.parametrize("pattern", [(1,), (2,), (3,), (1, 1, 1, 3), (4, 1, 2), (6,)], ids=str)
def test_repeated_frames_are_no_cuts(pattern, tmp_path):
    first, second = list(synthetic.scene(51, 24, pan=(3, 1))), list(synthetic.scene(52, 24, pan=(-3, 1)))
    path = str(tmp_path / "repeated.mp4")
    synthetic.written(path, [*repeated(first, pattern), *repeated(second, pattern)], crf=23)
    _, spans = scenes(path, 24.0, config())
    middle = len(repeated(first, pattern))
    assert spans == [(0, middle), (middle, 2 * middle)]


def test_stills_that_last_as_long_as_a_scene_are_scenes(tmp_path):
    path = str(tmp_path / "slides.mp4")
    synthetic.written(path, repeated([next(synthetic.scene(60 + k, 1)) for k in range(5)], (9,)), crf=23)
    _, spans = scenes(path, 24.0, config())
    assert spans == [(9 * k, 9 * k + 9) for k in range(5)]


def test_without_repeats_the_rule_is_that_of_pyscenedetect(corpus):
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    from data_pipelines.decode import stream

    for file in ("cuts_a.mp4", "cuts_b.mp4", "pan_right.mp4"):
        theirs, found = AdaptiveDetector(3.0, min_scene_len=8, min_content_val=4.0), []
        for number, (_, image) in enumerate(stream(os.path.join(corpus[0], file), longer=256)):
            image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            found += theirs.process_frame(FrameTimecode(number, 24.0), image)
        _, spans = scenes(os.path.join(corpus[0], file), 24.0, config(min_content=4.0))
        assert [a for a, _ in spans[1:]] == [cut.frame_num for cut in found], file


def test_margins_stay_inside(corpus):
    _, spans = scenes(os.path.join(corpus[0], "cuts_a.mp4"), 24.0, config(margin_frames=2))
    assert spans == [(0, 28), (32, 71), (75, 100)]


def test_dark_ends_and_gaps():
    assert without(0, 10, {0, 1, 9}, []) == [(2, 9)]
    assert without(0, 10, set(range(10)), []) == []
    assert without(0, 10, set(), [(3, 5), (7, 12)]) == [(0, 3), (5, 7)]
    assert without(0, 10, set(), [(-2, 2), (20, 30)]) == [(2, 10)]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [(0, 100)]),
        ({"max_seconds": 4.0}, [(0, 33), (33, 66), (66, 100)]),
        ({"max_seconds": 4.0, "too_long": "truncate"}, [(0, 40)]),
        ({"min_seconds": 10.1}, []),
        ({"min_seconds": 10.0, "max_seconds": 10.0}, [(0, 100)]),
    ],
)
def test_length_limits(options, expected):
    limits = SimpleNamespace(**{"max_seconds": 0.0, "min_seconds": 0.0, "too_long": "split", **options})
    assert limited([(0, 100)], [k / 10 for k in range(100)], 10.0, limits) == expected


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="choose from adaptive"):
        STAGE.check(config(detectors=("adaptive", "magic")))
    with pytest.raises(UserError, match="split or truncate"):
        STAGE.check(config(too_long="drop"))


def test_bytes_depend_on_the_frames_alone(tmp_path):
    """Also when threads encode side by side and reuse each other's memory, at the default preset."""
    from concurrent.futures import ThreadPoolExecutor

    scenes = [list(synthetic.scene(41, 30, zoom=1.012)), list(synthetic.scene(42, 30, pan=(-2, 0)))]

    def encoded(k):
        path = tmp_path / f"{k}.mp4"
        with Encoder(str(path), 24.0) as encoder:
            for image in scenes[k % 2]:
                encoder.add(image)
        return path.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(encoded, range(8)))
    assert len(set(made[::2])) == len(set(made[1::2])) == 1
