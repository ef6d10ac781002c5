"""The judge of shapes clips is itself judged: by real clips, by captions that are wrong in one word, by things that are
no shape at all."""

from dataclasses import replace

import numpy as np
import pytest

from opensora_jax.data import shapes
from opensora_jax.data.video_io import encode_video, read_frames
from tests.oracle import ATTRIBUTES, agrees, judge

EVERY = shapes.scenes("all", tuple(shapes.COLOURS | shapes.NOVEL_COLOURS))
VALUES = {
    "colour": tuple(shapes.COLOURS | shapes.NOVEL_COLOURS),
    "shape": shapes.SHAPES,
    "direction": tuple(shapes.DIRECTIONS),
    "background": tuple(shapes.BACKGROUNDS),
}


@pytest.fixture(scope="module", params=[32, 64])
def clips(request):
    """Every scene once."""
    return [(scene, shapes.draw(scene, np.random.default_rng(i), size=request.param)) for i, scene in enumerate(EVERY)]


def right(seen, caption) -> bool:
    return all(agrees(seen, caption).values())


def test_real_clips_are_right_before_and_after_h264_and_for_no_other_caption(clips):
    seen = [(judge(frames), scene) for scene, frames in clips]
    assert np.mean([right(found, scene.caption) for found, scene in seen]) >= 0.99
    coded = [(read_frames(encode_video(frames, 8.0, crf=18)), scene) for scene, frames in clips[::3]]
    assert np.mean([right(judge(frames), scene.caption) for frames, scene in coded]) >= 0.99
    wrong = [
        right(found, replace(scene, **{name: value}).caption)
        for found, scene in seen
        for name in ATTRIBUTES
        for value in VALUES[name]
        if value != getattr(scene, name)
    ]
    assert len(wrong) == len(EVERY) * 12 and np.mean(wrong) <= 0.05


def test_what_is_no_moving_shape_is_refused(clips):
    rng = np.random.default_rng(0)
    for scene, frames in clips[::12]:
        size = frames.shape[1]
        rows, columns = shapes.DIRECTIONS[scene.direction]
        halves = frames.copy()  # the shape torn in two, across its way
        still = np.repeat(frames[:1], len(frames), axis=0)
        grey = frames[:, :1, :1]
        away = np.abs(frames.astype(int) - grey).max(-1) > 40
        for t, mask in enumerate(away):
            y, x = np.round(np.argwhere(mask).mean(0)).astype(int)
            gap = max(2, size // 14)
            cut = (
                (slice(None), slice(x - gap // 2, x + gap - gap // 2))
                if rows
                else (slice(y - gap // 2, y + gap - gap // 2),)
            )
            halves[t][cut] = grey[t]
        refused = {
            "noise": rng.integers(0, 256, frames.shape, dtype=np.uint8),
            "a noisy clip": np.where(rng.random(frames.shape[:3])[..., None] < 0.5, frames, 255 - frames).astype(
                np.uint8
            ),
            "a still": still,
            "nothing": np.broadcast_to(grey, frames.shape).astype(np.uint8),
            "halves": halves,
            "frames in any order": frames[rng.permutation(len(frames))],
            "a shape that comes and goes": np.where((np.arange(len(frames)) % 2)[:, None, None, None], frames, grey),
        }
        for name, clip in refused.items():
            assert isinstance(judge(clip), str), f"{name}: {scene.caption}"
