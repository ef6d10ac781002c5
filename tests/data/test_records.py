"""Shard records: round trip, checks, complete shards only."""

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.data.records import (
    ShardWriter,
    decode_pieces,
    decode_record,
    encode_record,
    read_manifest,
    verify_folder,
)
from opensora_jax.data.records import write_manifest as finish
from opensora_jax.data.sources import open_source

FACTS = {"id": "a", "text": "a cat", "num_frames": 5, "fps": 24.0, "height": 8, "width": 8}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_round_trip(dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    latents = np.arange(24).reshape(2, 3, 1, 4).astype(kind)
    record = FACTS | {"latents": latents, "text_mask": np.array([True, False]), "meta": {"aes": 5.5, "tags": ["x"]}}
    found = decode_record(encode_record(record))
    assert found["latents"].dtype == latents.dtype and found["meta"] == record["meta"]
    np.testing.assert_array_equal(found["latents"], latents)
    np.testing.assert_array_equal(found["text_mask"], [True, False])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": None}, "`text` must be str"),
        ({"num_frames": "5"}, "`num_frames` must be int"),
        ({"video": None, "latents": np.zeros(1)}, "either `video`"),
        ({"score": 1.0}, "unknown field"),
    ],
)
def test_a_wrong_record_names_its_field(change, words):
    with pytest.raises(UserError, match=words):
        encode_record(FACTS | {"video": b"x"} | change)


def test_bytes_that_are_no_record():
    with pytest.raises(ValueError, match="not a shard record"):
        decode_record(b"\x93nonsense")


def test_shards_carry_their_name_only_when_complete_and_restart_exactly(tmp_path):
    records = [FACTS | {"id": str(i), "video": bytes([i] * 50)} for i in range(10)]
    with ShardWriter(tmp_path / "whole", records_per_shard=4) as writer:
        for record in records:
            writer.write(record)
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "broken", records_per_shard=4) as writer:
        for record in records[:6]:
            writer.write(record)
        raise RuntimeError("killed")
    assert [p.name for p in sorted((tmp_path / "broken").iterdir())] == ["clips-00000.array_record", "clips-00000.json"]
    with ShardWriter(tmp_path / "broken", records_per_shard=4) as writer:
        assert writer.records_done == 4
        for record in records[writer.records_done :]:
            writer.write(record)
    whole, again = finish(tmp_path / "whole", scale=0.5), finish(tmp_path / "broken", scale=0.5)
    assert whole == again == read_manifest(tmp_path / "whole") and whole["records"] == 10 and whole["scale"] == 0.5
    source = open_source(tmp_path / "broken")
    assert [source[i]["id"] for i in range(10)] == [str(i) for i in range(10)]
    assert [r["id"] for r in source.__getitems__([7, 1])] == ["7", "1"]


def test_a_changed_shard_is_found(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(FACTS | {"video": b"abc"})
    finish(tmp_path)
    assert verify_folder(tmp_path) == []
    path = next(tmp_path.glob("*.array_record"))
    data = bytearray(path.read_bytes())
    data[data.find(b"abc")] ^= 1
    path.write_bytes(bytes(data))
    assert verify_folder(tmp_path) == [path.name]


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write shards"):
        ShardWriter(tmp_path / "file" / "inside")


def test_foreign_shards_without_side_files(shards, tmp_path):
    for path in shards.glob("*.array_record"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ours, foreign = open_source(shards), open_source(tmp_path)
    np.testing.assert_array_equal(ours.shapes, foreign.shapes)
    np.testing.assert_array_equal(ours.fps, foreign.fps)


def test_large_parts_are_read_without_the_rest():
    latents = np.arange(40_000, dtype=np.float32).reshape(2, 100, 50, 4)
    embedding = np.ones((300, 128), np.float16)
    payloads = ({"latents": latents, "text_emb": embedding, "meta": {"long": "x" * 70_000}}, {"video": bytes(100_000)})
    for payload in payloads:
        data = encode_record(FACTS | payload)
        found = decode_record(data)
        assert list(found) == list(FACTS | payload)
        for key, value in (FACTS | payload).items():
            np.testing.assert_array_equal(found[key], value)
        for end in (len(data) - 1, len(data) - 70_000, 66_000):
            with pytest.raises(ValueError, match="not a shard record"):
                decode_record(data[:end])
    asked = []
    fetch = lambda at, count: asked.append((at, count)) or data[at : at + count]
    data = encode_record(FACTS | payloads[0] | {"meta": 1})
    found = decode_pieces(fetch, lambda key, dtype, shape, at: (key, dtype, tuple(shape), at))
    assert sum(count for _, count in asked) <= 5 * 4096 < len(data) / 10
    for key in ("latents", "text_emb"):
        name, dtype, shape, at = found[key]
        value = payloads[0][key]
        assert (name, dtype, shape) == (key, value.dtype, value.shape)
        assert data[at : at + value.nbytes] == value.tobytes()
