"""Parts of records straight out of ArrayRecord files: the same bytes as ArrayRecord's reader gives, or a refusal."""

import pickle
import random

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from opensora_jax.common.errors import UserError
from opensora_jax.data.array_record_file import USABLE, ArrayRecordFile
from opensora_jax.data.loader import DataConfig, make_loader
from opensora_jax.data.records import OPTIONS, ShardWriter, encode_record
from opensora_jax.data.sources import JoinedSource, open_source


def written(path, payloads, options=OPTIONS) -> str:
    writer = ArrayRecordWriter(str(path), options)
    for data in payloads:
        writer.write(data)
    writer.close()
    return str(path)


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS + ",pad_to_block_boundary:true"])
def test_every_byte_is_where_the_reader_finds_it(tmp_path, options):
    rng = random.Random(0)
    near = [USABLE - 40 - 5 + k for k in range(-2, 3)]  # whose chunks end about where a block does
    sizes = [0, 1, 127, 128, *near, *(rng.randrange(200_000) for _ in range(40)), 0, 16383, 16384, *near]
    path = written(tmp_path / "a.array_record", map(rng.randbytes, sizes), options)
    file, reader = ArrayRecordFile(path), ArrayRecordReader(path, "readahead_buffer_size:0")
    assert file.sizes == sizes
    for index, size in enumerate(sizes):
        whole = reader.read([index])[0]
        start = rng.randrange(size + 1)
        assert file.read(index, 0, size + 9) == whole
        assert file.read(index, start, 70_000) == whole[start : start + 70_000]


def test_a_record_longer_than_one_call_can_scatter(tmp_path, monkeypatch):
    monkeypatch.setattr("opensora_jax.data.array_record_file.BLOCKS_AT_ONCE", 3)
    data = np.random.default_rng(0).bytes(9 * USABLE + 17)
    file = ArrayRecordFile(written(tmp_path / "a.array_record", [b"first", data]))
    assert file.read(1, 0, len(data)) == data and file.read(1, 100, 5 * USABLE) == data[100 : 100 + 5 * USABLE]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("group_size:2,uncompressed", "several records in a chunk"),
        ("group_size:1", "no uncompressed records"),
        ("group_size:1,uncompressed,transpose", "no uncompressed records"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        ArrayRecordFile(written(tmp_path / "a.array_record", [b"one" * 99, b"two" * 99, b"three"], options))


@pytest.mark.parametrize(
    ("damage", "words"), [("holes", "record 0 is damaged"), ("cut", "no uncompressed"), ("text", "is no ArrayRecord")]
)
def test_damage_is_noticed(tmp_path, damage, words):
    path = tmp_path / "a.array_record"
    written(path, [np.random.default_rng(0).bytes(300_000) for _ in range(2)])
    data = bytearray(path.read_bytes())
    if damage == "holes":  # as a file has that was copied in part
        data[1 << 16 : 3 << 16] = bytes(2 << 16)
    path.write_bytes(b"no shard" if damage == "text" else data[: 5 << 16] if damage == "cut" else data)
    with pytest.raises((OSError, ValueError), match=words):
        ArrayRecordFile(str(path)).read(0, 0, 300_000)


def latents(count, *, frames=4):
    for k in range(count):
        rng = np.random.default_rng(k)
        facts = {"id": f"clip {k}", "text": f"number {k}", "num_frames": frames, "fps": 8.0, "height": 32, "width": 32}
        arrays = {"text_emb": rng.normal(size=(200, 128)).astype(np.float32), "text_mask": rng.random(200) < 0.5}
        yield facts | {"latents": rng.normal(size=(frames, 64, 64, 4)).astype(np.float16)} | arrays


def batches(folder, steps=3, **options):
    loader = make_loader(DataConfig(source=str(folder), batch_size=2, **options))
    found = [next(loader) for _ in range(steps)]
    loader.close()
    return found


def test_a_batch_of_latents_is_the_records(tmp_path):
    with ShardWriter(tmp_path, records_per_shard=3) as writer:
        for record in latents(5):
            writer.write(record)
    known = {record["id"]: record for record in latents(5)}
    source = open_source(tmp_path)
    for batch, info in batches(tmp_path):
        for row, name in enumerate(info.ids):
            assert batch["text"][row] == known[name]["text"]
            for key in ("latents", "text_emb", "text_mask"):
                np.testing.assert_array_equal(batch[key][row], known[name][key])
    assert source._file(source.files[0]) is not None  # so that the above was not the other way
    there = pickle.loads(pickle.dumps(JoinedSource([source, source])))  # as a worker process has it
    record = there.into(7, lambda key, shape, dtype: np.empty(shape, dtype))
    np.testing.assert_array_equal(record["latents"], known["clip 2"]["latents"])


def test_shards_that_others_compressed_give_the_same_batches(tmp_path):
    (tmp_path / "theirs").mkdir()
    with ShardWriter(tmp_path / "ours") as writer:
        for record in latents(4):
            writer.write(record)
    written(tmp_path / "theirs" / "clips.array_record", map(encode_record, latents(4)), "group_size:1")
    for (ours, info), (theirs, other) in zip(batches(tmp_path / "ours"), batches(tmp_path / "theirs")):
        assert info.ids == other.ids and ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_a_damaged_record_is_replaced_and_named(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for record in latents(4):
            writer.write(record)
    path = tmp_path / "clips-00000.array_record"
    data = bytearray(path.read_bytes())
    data[(1 << 16) + 8] ^= 1  # in the first block header inside record 0
    path.write_bytes(data)
    found = batches(tmp_path, steps=2, max_bad_share=1.0)
    assert {reason for _, info in found for _, reason in info.bad} == {f"OSError: {path}: record 0 is damaged"}
    assert all("clip 0" not in info.ids for _, info in found)


def test_records_of_one_batch_must_be_encoded_alike(tmp_path):
    with ShardWriter(tmp_path / "keys") as keys, ShardWriter(tmp_path / "shapes") as shapes:
        for number, record in enumerate(latents(2)):
            keys.write(record if number else {k: v for k, v in record.items() if k != "text_emb"})
            shapes.write(record if number else record | {"text_emb": record["text_emb"][:150]})
    with pytest.raises(UserError, match="only one has `text_emb`"):
        batches(tmp_path / "keys")
    with pytest.raises(UserError, match=r"`text_emb` is \[\d+, 128\] float32 in one record"):
        batches(tmp_path / "shapes")
