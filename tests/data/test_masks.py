"""Frame masks: kinds, shares, and what every kind must leave."""

import random

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data.masks import (
    MASK_TYPES,
    NAMES,
    MaskGenerator,
    condition_frames,
    latent_frames,
    pick_mask_type,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 30])
def test_every_kind_leaves_something_to_generate(name, frames):
    draw = MaskGenerator({name: 1.0})
    masks = [draw(frames, random.Random(seed)) for seed in range(40)]
    assert all(mask.shape == (frames,) and mask.any() for mask in masks)
    if frames == 1 or name == "identity":
        assert all(mask.all() for mask in masks)
    elif frames > 3:
        assert not all(mask.all() for mask in masks)
    if name.endswith("head_tail") and frames > 3:
        assert all((mask == mask[::-1]).all() and not mask[0] for mask in masks)
    if name.startswith("quarter") and frames == 30:
        ends = 2 if name.endswith("head_tail") else 1
        assert {int((~mask).sum()) // ends for mask in masks} <= set(range(1, 8))


def test_shares_are_kept_and_the_rest_is_identity():
    draw = MaskGenerator({"mask_image_head": 0.25, "mask_no": 0.5, "mask_image_tail": 0.25})
    rng = random.Random(0)
    masks = np.array([draw(8, rng) for _ in range(2000)])
    assert abs((~masks[:, 0]).mean() - 0.25) < 0.03 and abs(masks.all(1).mean() - 0.5) < 0.03
    assert MaskGenerator({"random": 0.4}).ratios["identity"] == 0.6


@pytest.mark.parametrize(
    ("ratios", "words"),
    [({"head": 1.0}, "unknown mask"), ({"random": 0.7, "image_head": 0.4}, "add up"), ({"random": -1}, "lie in")],
)
def test_mistakes_in_shares(ratios, words):
    with pytest.raises(UserError, match=words):
        MaskGenerator(ratios)


def test_conditions_of_1_3():
    rng = random.Random(0)
    assert condition_frames("i2v_loop", 7, rng) == [0, 6] and condition_frames("i2v", 7, rng) == [0]
    assert condition_frames("v2v_head_noisy", 7, rng) == [0, 1, 2] and condition_frames("v2v_tail", 7, rng) == [
        3,
        4,
        5,
        6,
    ]
    assert all(condition_frames(kind, 1, rng) == [] for kind in MASK_TYPES)
    for _ in range(50):
        given = condition_frames("other", 7, rng)
        assert 1 <= len(given) <= 5 and (given[0] == 0 or given[-1] == 6)
    weights = {"none": 3, "i2v_head": 1}
    drawn = [pick_mask_type(weights, rng) for _ in range(400)]
    assert 60 < drawn.count("i2v_head") < 140
    with pytest.raises(UserError, match="unknown"):
        pick_mask_type({"i2v_middle": 1}, rng)


@pytest.mark.parametrize(
    ("frames", "stride", "chunk", "latents"),
    [(51, 4, 17, 15), (1, 4, 17, 1), (102, 4, 17, 30), (113, 4, 0, 29), (16, 1, 0, 16)],
)
def test_latent_frames(frames, stride, chunk, latents):
    assert latent_frames(frames, time_stride=stride, time_chunk_frames=chunk) == latents


def test_latent_frames_of_chunks_that_share_a_frame():
    """1.3: 17 frames at a time, each with the last frame of the chunk before."""
    count = lambda frames: latent_frames(frames, time_stride=4, time_chunk_frames=17, time_overlap_frames=1)
    assert [count(frames) for frames in (1, 17, 33, 49, 113)] == [1, 5, 10, 15, 35]
    assert count(40) == 10 + 2  # what is left begins with the shared frame too
