"""The plan: reachable in any order, equal for equal seeds, and loud about tables that do not fit the data."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data.buckets import BucketTable
from opensora_jax.data.plan import Plan

TABLE = {"240p": {1: (1.0, 8), 51: (0.5, 4)}, "144p": {51: (1.0, 4), 102: ((1.0, 0.33), 2)}}


@pytest.fixture(scope="module")
def shapes():
    rng = np.random.default_rng(0)
    sizes = np.array([(240, 426), (144, 256), (426, 240), (60, 60)])[rng.integers(0, 4, 400)]
    return np.column_stack([rng.choice([1, 60, 120, 30], 400), sizes])


def clips(step):
    return [step.clip(slot) for slot in range(step.size)]


def test_every_step_can_be_reached_directly(shapes):
    walked, fresh = Plan(shapes, BucketTable(TABLE), seed=3), Plan(shapes, BucketTable(TABLE), seed=3)
    steps = [walked.at(step) for step in range(3 * walked.steps_per_epoch)]
    for step in (len(steps) - 1, 0, len(steps) // 2):
        found = fresh.at(step)
        assert (
            clips(found) == clips(steps[step])
            and found.bucket == steps[step].bucket
            and found.epoch == steps[step].epoch
        )
    assert {step.epoch for step in steps} >= {0, 1, 2}
    other = Plan(shapes, BucketTable(TABLE), seed=4)
    assert [clips(other.at(step)) for step in range(5)] != [clips(step) for step in steps[:5]]


@pytest.mark.parametrize("table", [TABLE, {"240p": {1: (1.0, 8)}}], ids=["drawn", "certain"])
def test_each_epoch_is_made_once_and_threads_may_share_a_plan(shapes, table, monkeypatch):
    made, make = [], Plan._make_epoch

    def slowly(plan, number):
        made.append(number)
        time.sleep(0.01)
        return make(plan, number)

    monkeypatch.setattr(Plan, "_make_epoch", slowly)
    alone = Plan(shapes, BucketTable(table), seed=3)
    steps = range(5 * alone.steps_per_epoch)
    expected = [clips(alone.at(step)) for step in steps]
    assert made[:5] == [0, 1, 2, 3, 4] and len(made) <= 6
    shared = pickle.loads(pickle.dumps(Plan(shapes, BucketTable(table), seed=3)))  # as a worker process has it
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda step: clips(shared.at(step)), steps)) == expected


def test_an_epoch_uses_no_clip_twice_and_follows_the_table(shapes):
    table = BucketTable(TABLE)
    plan = Plan(shapes, table, seed=5, batch_scale=2)
    seen = []
    for step in range(plan.steps_per_epoch):
        found = plan.at(step)
        assert found.size == 2 * found.bucket.batch_size
        for clip in clips(found):
            assert table.assign(*shapes[clip].tolist(), seed=5 + clip * table.num_buckets) == found.bucket
        seen += clips(found)
    assert len(seen) == len(set(seen))


def test_keep_probabilities_are_drawn_anew_each_epoch(shapes):
    plan = Plan(shapes, BucketTable(TABLE), seed=0)
    first, second = (set(plan.epoch(number).unassigned.tolist()) for number in (0, 1))
    small = {index for index, shape in enumerate(shapes) if shape[1] == 60}
    assert small <= first & second


def test_last_batches_are_dropped_or_filled(shapes):
    twenty = np.tile([17, 64, 64], (20, 1))
    table = BucketTable({"64x64": {17: (1.0, 8)}})
    assert Plan(twenty, table).steps_per_epoch == 2
    plan = Plan(twenty, table, drop_last=False)
    assert plan.steps_per_epoch == 3
    assert sorted({clip for step in range(3) for clip in clips(plan.at(step))}) == list(range(20))


def test_encoded_shapes_are_their_own_buckets():
    shapes = np.array([[17, 64, 64]] * 6 + [[1, 64, 64]] * 8)
    plan = Plan(shapes, BucketTable({"64x64": {17: (1.0, 2)}}), exact_batch_size=4)
    assert {(step.bucket.num_frames, step.size) for step in map(plan.at, range(5))} == {(17, 2), (1, 4)}


def test_the_fingerprint_notices_what_would_change_the_order(shapes):
    prints = {
        Plan(shapes, BucketTable(TABLE)).fingerprint(),
        Plan(shapes, BucketTable(TABLE), seed=1).fingerprint(),
        Plan(shapes[:-1], BucketTable(TABLE)).fingerprint(),
        Plan(shapes, BucketTable(TABLE), batch_scale=2).fingerprint(),
        Plan(shapes, BucketTable(TABLE | {"144p": {51: (1.0, 5)}})).fingerprint(),
    }
    assert len(prints) == 5 and Plan(shapes.copy(), BucketTable(TABLE)).fingerprint() in prints


def test_starving_buckets_are_named_with_their_counts():
    shapes = np.array([[60, 144, 256]] * 10 + [[0, 0, 0]] * 2 + [[60, 50, 50]] * 3 + [[9, 144, 256]])
    table = BucketTable({"144p": {51: (1.0, 4), 102: (1.0, 2)}, "240p": {51: (1.0, 20)}})
    plan = Plan(shapes, table)
    with pytest.raises(UserError) as error:
        plan.check()
    said = f"{error.value}\n{error.value.details}"
    for words in (
        "2 of 3 buckets have too few clips",
        "empty: no clip",
        "3 too small",
        "2 unreadable",
        "1 too short",
        "allow_starving",
    ):
        assert words in said
    plan.check(allow_starving=True)
    with pytest.raises(UserError, match="no bucket has enough clips"):
        Plan(shapes, BucketTable({"144p": {51: (1.0, 11)}})).check(allow_starving=True)
    with pytest.raises(UserError) as error:
        Plan(shapes, BucketTable({"144p": {51: (1.0, 11)}})).check()
    assert "starving: no shape has the 11 clips" in error.value.details
    with pytest.raises(UserError, match="whole batch size"):
        Plan(shapes, BucketTable({"144p": {51: (1.0, None)}})).check()
