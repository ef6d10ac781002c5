"""Near-duplicates by hash and by embedding, exact and indexed."""

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.dedup import STAGE, components, hash_pairs
from data_pipelines.fingerprint import phash
from data_pipelines.synthetic import texture
from opensora_jax.common.errors import UserError


def hashes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 63, (count, 4), dtype=np.uint64) * np.uint64(2)


def column(words):
    return pa.array(list(words), pa.list_(pa.uint64(), 4))


def flipped(row, bits, seed=1):
    row = row.copy()
    for bit in np.random.default_rng(seed).choice(256, bits, replace=False):
        row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return row


def found(table, **options):
    return STAGE(STAGE.Config(**options)).table(table)


def test_the_best_of_each_group_stays():
    words = hashes(6)
    words[3], words[5] = flipped(words[0], 10), flipped(words[0], 20, seed=2)
    table = pa.table(
        {"id": list("abcdef"), "phash": column(words), "resolution": [1, 1, 1, 3, 1, 2], "num_frames": [9] * 6}
    )
    kept, report = found(table)
    assert kept["id"].to_pylist() == ["b", "c", "d", "e"]
    assert (report["duplicates"], report["groups"], report["largest_group"]) == (2, 1, 3)
    marked, _ = found(table, drop=False)
    assert marked["duplicate_of"].to_pylist() == ["d", None, None, None, None, "d"]
    assert marked["duplicate_similarity"][0].as_py() == pytest.approx(1 - 10 / 256)
    assert found(table, most_bits=15)[1]["duplicates"] == 1
    assert found(table, keep_by=())[0]["id"].to_pylist() == list("abce"), "ties go to the first id"


def test_bands_find_what_the_exact_comparison_finds():
    words = hashes(3000)
    for k in range(60):
        words[1500 + k] = flipped(words[k], k % 15 + 1, seed=k)
    pairs = [
        sorted(
            {
                tuple(sorted(p))
                for block, _ in hash_pairs(pa.chunked_array([column(words)]), 24, rows)
                for p in block.tolist()
            }
        )
        for rows in (20_000, 10)
    ]
    assert pairs[0] == pairs[1] == [(k, 1500 + k) for k in range(60)]


def test_empty_pictures_match_nothing():
    words = [None, None, [1, 2, 3, 4], [1, 2, 3, 4]]
    table = pa.table({"id": list("abcd"), "phash": pa.array(words, pa.list_(pa.uint64(), 4))})
    assert found(table, keep_by=())[0]["id"].to_pylist() == ["a", "b", "c"]


def test_embeddings_exact_and_indexed():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    vectors[200] = vectors[7] * 3 + 0.01 * rng.normal(size=16)
    rows = pa.array(list(vectors), pa.list_(pa.float32(), 16))
    table = pa.table({"id": [f"{k:03d}" for k in range(300)], "clip": rows})
    options = dict(most_bits=0, embedding="clip", keep_by=(), drop=False)
    exact, _ = found(table, **options)
    indexed, _ = found(table, **options, index_rows=10)
    assert exact["duplicate_of"].to_pylist() == indexed["duplicate_of"].to_pylist()
    assert [k for k, v in enumerate(exact["duplicate_of"].to_pylist()) if v] == [200]
    with pytest.raises(UserError, match="nothing to compare"):
        STAGE.check(STAGE.Config(most_bits=0))


def test_groups_are_connected_components():
    group = components(7, np.array([1, 2, 5, 3]), np.array([2, 4, 6, 5]))
    assert group.tolist() == [0, 1, 1, 3, 1, 3, 3]


def test_hash_outlives_scaling_and_noise():
    import cv2

    grey = texture(3, 120, 160)[..., 0]
    small = cv2.resize(grey, (80, 60), interpolation=cv2.INTER_AREA)
    noisy = np.clip(small * 0.9 + np.random.default_rng(0).normal(0, 4, small.shape) + 8, 0, 255).astype(np.uint8)
    assert (phash(grey) ^ phash(noisy)).bit_count() <= 6
    assert (phash(grey) ^ phash(texture(4, 120, 160)[..., 0])).bit_count() > 16
