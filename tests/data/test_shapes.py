"""The procedural data set: what captions promise is what pixels show."""

from collections import Counter

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data import shapes
from opensora_jax.data.sources import open_source


def test_twelve_triples_are_held_out_with_every_value_on_both_sides():
    assert len(set(shapes.HELD_OUT)) == 12
    seen = {scene.triple for scene in shapes.scenes("train")}
    assert len(seen) == 60 and not seen & set(shapes.HELD_OUT)
    values = (set(shapes.COLOURS), set(shapes.SHAPES), set(shapes.DIRECTIONS))
    for side in (seen, shapes.HELD_OUT):
        assert tuple({triple[i] for triple in side} for i in range(3)) == values
    assert [sorted(Counter(t[i] for t in shapes.HELD_OUT).values()) for i in range(3)] == [[2] * 6, [4] * 3, [3] * 4]


def test_captions_read_back():
    for scene in shapes.scenes("all", (*shapes.COLOURS, "orange")):
        assert shapes.parse_caption(scene.caption) == scene
    assert shapes.scenes("all")[0].caption == "a red circle moving left on a dark background"
    for wrong in ("a red circle", "a mauve circle moving left on a dark background"):
        with pytest.raises(UserError, match="not a caption"):
            shapes.parse_caption(wrong)


@pytest.mark.parametrize("scene", shapes.scenes("all", ("red", "orange"))[::5], ids=lambda scene: scene.caption)
def test_pixels_show_the_caption(scene):
    for seed in range(6):
        frames = shapes.draw(scene, np.random.default_rng(seed)).astype(float)
        grey = frames[0, 0, 0, 0]
        assert (grey < 128) == (scene.background == "dark")
        away = np.abs(frames - grey).max(-1) > 40
        assert not away[:, [0, -1]].any() and not away[:, :, [0, -1]].any(), "the shape leaves the frame"
        areas = away.sum((1, 2))
        assert areas.min() > 100 and areas.max() < 1.15 * areas.min()
        centres = np.array([np.argwhere(frame).mean(0) for frame in away])
        moved = centres[-1] - centres[0]
        rows, columns = shapes.DIRECTIONS[scene.direction]
        assert moved @ (rows, columns) > 16 and abs(moved @ (columns, rows)) < 1
        paint = np.median(frames[0][away[0]], axis=0)
        assert np.abs(paint - (shapes.COLOURS | shapes.NOVEL_COLOURS)[scene.colour]).max() < 10


def test_source_and_shards_hold_the_same_clips(shards):
    drawn, written = open_source("shapes:train?count=48&size=32"), open_source(shards)
    assert len(drawn) == len(written) == 48
    assert [drawn[i]["text"] for i in range(48)] == [written[i]["text"] for i in range(48)]
    again = open_source("shapes:train?count=48&size=32")
    np.testing.assert_array_equal(drawn[7]["frames"], again[7]["frames"])
    other = open_source("shapes:train?count=48&size=32&seed=1")
    assert not np.array_equal(drawn[7]["frames"], other[7]["frames"])


def test_options_are_checked():
    assert len(open_source("shapes:heldout?colours=red,blue&count=5")) == 5
    for spec, words in [
        ("shapes:trian", "unknown split"),
        ("shapes:train?colour=red", "unknown option `colour`"),
        ("shapes:train?count=many", "whole number"),
        ("shapes:train?colours=mauve", "unknown colour"),
        ("shapes:heldout?colours=orange", "no scene"),
    ]:
        with pytest.raises(UserError, match=words):
            open_source(spec)
