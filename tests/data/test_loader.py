"""Batches are a function of (seed, step) alone: processes, workers and restarts change nothing."""

import dataclasses

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data.loader import DataConfig, make_loader
from opensora_jax.data.records import ShardWriter, write_manifest
from opensora_jax.data.sources import open_source


@pytest.fixture(scope="module")
def config(shards):
    masks = {"random": 0.3, "image_head": 0.3}
    return DataConfig(
        source=str(shards), batch_size=4, height=32, width=32, mask_ratios=masks, time_stride=4, time_chunk_frames=17
    )


def take(config, count, start=0, **where):
    loader = make_loader(config, start_step=start, **where)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.fixture(scope="module")
def unbroken(config):
    return take(config, 14)  # 12 steps an epoch


def assert_same(batches, others):
    for (batch, info), (other, other_info) in zip(batches, others, strict=True):
        assert info.ids == other_info.ids and info.step == other_info.step
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_contract_of_a_batch(unbroken):
    batch, info = unbroken[0]
    assert batch["video"].shape == (4, 17, 32, 32, 3) and batch["video"].dtype == np.float32
    assert batch["video"].min() >= -1 and batch["video"].max() <= 1
    assert batch["x_mask"].shape == (4, 5) and batch["x_mask"].dtype == bool
    assert batch["fps"].tolist() == [8.0] * 4 and batch["num_frames"].tolist() == [17] * 4
    assert batch["height"].tolist() == batch["width"].tolist() == [32] * 4
    assert len(batch["text"]) == 4 and all(text.startswith("a ") for text in batch["text"])
    assert len(info.ids) == 4 and info.bucket.shape == (17, 32, 32)
    assert not all(mask.all() for batch, _ in unbroken for mask in batch["x_mask"])


def test_conditions_of_1_3_are_drawn_a_batch(config):
    kinds = {"v2v_head_noisy": 1.0, "i2v_tail": 1.0}
    batches = [batch for batch, _ in take(dataclasses.replace(config, mask_ratios=None, mask_types=kinds), 6)]
    for batch in batches:
        assert (batch["x_mask"] == batch["x_mask"][0]).all() and (batch["noisy"] != batch["x_mask"][0, 0]).all()
    assert {tuple(batch["x_mask"][0].tolist()) for batch in batches} == {
        (False, False, True, True, True),
        (True, True, True, True, False),
    }
    assert "noisy" not in take(dataclasses.replace(config, mask_ratios=None, mask_types={"none": 1.0}), 1)[0][0]


def test_an_epoch_shows_every_clip_once_and_the_next_another_order(unbroken):
    first = [name for _, info in unbroken[:12] for name in info.ids]
    assert len(set(first)) == 48
    assert unbroken[12][1].epoch == 1 and unbroken[12][1].ids != unbroken[0][1].ids


def test_resume_in_the_middle_is_bitwise(config, unbroken):
    assert_same(take(config, 4, start=10), unbroken[10:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(config, unbroken, processes):
    shares = [take(config, 3, process_index=i, process_count=processes) for i in range(processes)]
    for step, (batch, info) in enumerate(unbroken[:3]):
        assert sum((share[step][1].ids for share in shares), ()) == info.ids
        for key in ("video", "x_mask"):
            np.testing.assert_array_equal(np.concatenate([share[step][0][key] for share in shares]), batch[key])


def test_workers_change_nothing(config, unbroken):
    assert_same(take(dataclasses.replace(config, num_workers=2), 3, start=9), unbroken[9:12])


def test_position_is_checked_against_the_data(config, shards):
    loader = make_loader(config)
    next(loader)
    position = loader.position()
    assert position == {"seed": 0, "step": 1, "plan_hash": loader.plan_hash}
    loader.check_position(position)
    with pytest.raises(UserError, match="seed"):
        make_loader(dataclasses.replace(config, seed=1)).check_position(position)
    with pytest.raises(UserError, match="buckets or batch sizes"):
        make_loader(dataclasses.replace(config, batch_size=8)).check_position(position)


def test_a_batch_that_processes_cannot_share(config):
    with pytest.raises(UserError, match="cannot be shared by 3 processes"):
        make_loader(config, process_count=3)


def break_records(shards, folder, broken):
    source = open_source(shards)
    with ShardWriter(folder) as writer:
        for index in range(len(source)):
            record = source[index]
            writer.write(record | {"video": record["video"][:200]} if index in broken else record)
    write_manifest(folder)
    return {source[index]["id"] for index in broken}


def test_bad_records_are_replaced_by_the_same_clips_everywhere(config, shards, tmp_path, capfd):
    names = break_records(shards, tmp_path, {3, 17})
    lenient = dataclasses.replace(config, source=str(tmp_path), max_bad_share=0.2)
    whole = take(lenient, 12)
    assert {name for _, info in whole for name, _ in info.bad} == names
    assert not names & {name for _, info in whole for name in info.ids}
    shares = [take(lenient, 12, process_index=i, process_count=2) for i in range(2)]
    for step, (batch, _) in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([share[step][0]["video"] for share in shares]), batch["video"])
    said = capfd.readouterr().err
    assert all(name in said for name in names)


def test_too_many_bad_records_stop_the_run(config, shards, tmp_path):
    break_records(shards, tmp_path, set(range(0, 48, 4)))
    with pytest.raises(UserError, match="records read were bad"):
        take(dataclasses.replace(config, source=str(tmp_path)), 48)


def test_latent_records_pass_through_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    stored = [rng.normal(size=(5, 4, 4, 4)).astype(np.float16) for _ in range(8)]
    with ShardWriter(tmp_path) as writer:
        for index, latents in enumerate(stored):
            facts = {"id": str(index), "text": "t", "num_frames": 17, "fps": 8.0, "height": 32, "width": 32}
            text = {"text_emb": np.ones((6, 3), np.float32), "text_mask": np.arange(6) < 4}
            writer.write(facts | {"latents": latents} | text)
    (batch, info), *_ = take(DataConfig(source=str(tmp_path), batch_size=4), 1)
    assert "video" not in batch and batch["x_mask"].shape == (4, 5)
    assert batch["text_emb"].shape == (4, 6, 3) and batch["text_mask"].sum() == 16
    for row, name in enumerate(info.ids):
        np.testing.assert_array_equal(batch["latents"][row], stored[int(name)])
