"""Tokenizers: training a small one, loading it from its files alone, padding, cutting, clear errors."""

import json
import subprocess
import sys

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.text.tokenizers import load_tokenizer, train_tokenizer

CAPTIONS = [
    f"a {color} {shape} moves {way}"
    for color in ("red", "green", "blue")
    for shape in ("ball", "square", "triangle")
    for way in ("left", "right", "up", "down")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, folder, vocab_size=90, max_length=16)
    return folder


def test_a_trained_tokenizer_reads_what_it_learnt(folder):
    tokenizer = load_tokenizer(folder, max_length=16)
    ids, mask = tokenizer(CAPTIONS)
    assert ids.shape == mask.shape == (len(CAPTIONS), 16) and ids.dtype == mask.dtype == np.int32
    assert 2 not in ids and ids.max() < tokenizer.vocab_size <= 90
    assert len({tuple(row) for row in ids}) == len(CAPTIONS)
    assert tokenizer.decode(ids[0]) == CAPTIONS[0]
    assert mask[0].sum() == 6  # a word is a piece
    spelt = tokenizer("A  Zebra!", max_length=20)[0][0]
    assert 2 not in spelt and tokenizer.decode(spelt) == "a zebra!"
    assert 2 in tokenizer("球")[0]
    with pytest.raises(UserError, match="no room"):
        train_tokenizer(CAPTIONS, folder, vocab_size=20)


def test_padding_cutting_and_the_empty_text_follow_t5(folder):
    tokenizer = load_tokenizer(folder, max_length=6)
    ids, mask = tokenizer(["", "red", "a red ball moves left " * 9])
    assert ids[0].tolist() == [1, 0, 0, 0, 0, 0] and mask[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert ids[2][-1] == 1 and mask[2].all()
    np.testing.assert_array_equal(mask, ids != 0)
    assert tokenizer("red", max_length=9)[0].shape == (1, 9)
    assert tokenizer([])[0].shape == (0, 6)


def test_tokenizer_json_alone_is_enough(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    ours, whole = (load_tokenizer(source, max_length=12)(CAPTIONS) for source in (tmp_path, folder))
    np.testing.assert_array_equal(ours[0], whole[0])
    np.testing.assert_array_equal(ours[1], whole[1])


def test_a_sentencepiece_model_alone_is_read_as_t5s(tmp_path):
    import sentencepiece

    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=29, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ids, mask = load_tokenizer(tmp_path, max_length=32)(CAPTIONS[:5])
    for row, keep, caption in zip(ids, mask, CAPTIONS):
        assert row[: keep.sum()].tolist() == [*processor.encode(caption), 1]


def test_clip_pads_with_the_end_of_text(tmp_path):
    vocabulary = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "re", "red</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    ids, mask = load_tokenizer(tmp_path, max_length=5)(["Red", "a b c d e f"])
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    assert ids[0].tolist() == [start, vocabulary.index("red</w>"), end, end, end]
    assert mask[0].tolist() == [1, 1, 1, 0, 0]
    assert ids[1].tolist() == [start, *(vocabulary.index(f"{c}</w>") for c in "abc"), end]


def test_what_is_no_tokenizer_is_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer: wanted"):
        load_tokenizer(tmp_path, max_length=4)
    with pytest.raises(UserError, match="there is no tokenizer folder"):
        load_tokenizer(tmp_path / "absent", max_length=4)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path, max_length=4)


def test_transformers_is_imported_only_to_load():
    code = "import sys, opensora_jax.text.tokenizers; sys.exit('transformers' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
