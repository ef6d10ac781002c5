"""Clean-up of captions and the score suffixes of 1.2, 1.3 and 2.0."""

from pathlib import Path

import pyarrow as pa
import pytest

from data_pipelines import pipeline
from data_pipelines.caption_text import AESTHETIC, MOTION, SUFFIX, clean, word
from data_pipelines.pipeline import Options
from opensora_jax.common.errors import UserError
from opensora_jax.common.prompts import text_preprocessing
from opensora_jax.text.tokenizers import load_tokenizer
from tests.data_pipelines.steps import step

TOKENIZER = Path(__file__).parents[2] / "opensora_jax" / "assets" / "tiny" / "tokenizer"


@pytest.mark.parametrize(
    "raw, tidy",
    [
        ("The video shows a cat on a mat.", "A cat on a mat."),
        ("In this video, we can see two dogs running.", "Two dogs running."),
        ("Sure! Here is a detailed description of the video: The video depicts a river.", "A river."),
        ('"A red car drives past."', "A red car drives past."),
        ("**Caption:** A boat   sails ,slowly .", "A boat sails,slowly."),
        ("See https://example.com/x for <b>more</b> of the sea", "See for more of the sea."),
        ("A man walks. He turns aro", "A man walks."),
        ("Caption: the image features a lamp", "A lamp."),
        ("The scene is calm and the video shows", "The scene is calm and the video shows."),
        ("The video shows", "The video shows."),
        ("", ""),
    ],
)
def test_clean(raw, tidy):
    assert clean(raw) == tidy and clean(tidy) == tidy


ROWS = pa.table(
    {
        "id": ["a", "b", "c"],
        "text": ["The video shows a hill.", "A lake", None],
        "aes": [5.46, None, 6.5],
        "flow": [9.97, 0.2, None],
        "fps": [23.976, 30.0, None],
        "cmotion": ["pan left", None, None],
    }
)


def run(tmp_path, table=ROWS, **options):
    folder = str(tmp_path / "-".join(str(option).replace("/", "_") for option in options.values()))
    return pipeline.run([step("caption_text", **options)], table, Options(folder, quiet=True)).sort_by("id")


def test_scores_as_numbers_words_and_fps(tmp_path):
    assert run(tmp_path, scores="numbers")["text"].to_pylist() == [
        "A hill. aesthetic score: 5.5, motion score: 10.0, camera motion: pan left.",
        "A lake. motion score: 0.2.",
        "",
    ]
    assert run(tmp_path, scores="words")["text"].to_pylist() == [
        "A hill. the aesthetic score is fair. the motion strength is high. camera motion: pan left.",
        "A lake. the motion strength is very low.",
        "",
    ]
    fps = run(tmp_path, scores="fps")["text"].to_pylist()
    assert fps == ["A hill. 24 FPS, 10 motion score.", "A lake. 30 FPS, 0 motion score.", ""]
    plain = run(tmp_path, scores="none")
    assert plain["text"].to_pylist() == ["A hill.", "A lake.", ""] and plain["words"].to_pylist() == [2, 2, 0]
    assert plain["text_len"].null_count == 3  # no tokenizer


def test_the_camera_in_a_sentence(tmp_path):
    table = pa.table({"id": ["a", "b", "c"], "text": ["A hill."] * 3, "cmotion": ["pan left", "undetermined", None]})
    once = run(tmp_path / "once", table, scores="camera")
    assert once["text"].to_pylist() == ["A hill. The camera is panning left.", "A hill.", "A hill."]
    assert run(tmp_path / "twice", once, scores="camera")["text"] == once["text"]
    assert run(tmp_path / "words", table, scores="words")["text"][1].as_py() == "A hill."


def test_tokens_are_those_of_the_text_encoder(tmp_path):
    made = run(tmp_path, tokenizer=str(TOKENIZER), append="of course")
    ids, mask = load_tokenizer(TOKENIZER, 64)(made["text"].to_pylist()[:2])
    assert made["text_len"].to_pylist() == [*mask.sum(axis=1).tolist(), None] and made["words"][0].as_py() == 4
    with pytest.raises(UserError, match="no tokenizer folder"):
        run(tmp_path / "none", tokenizer="/none")


def test_a_caption_cleaned_as_a_prompt_is_left_alone_by_sampling_and_loses_its_scores_again(tmp_path):
    made = run(tmp_path, scores="words", t5_clean=True)
    text = made["text"][0].as_py()
    assert text == "a hill. the aesthetic score is fair. the motion strength is high. camera motion: pan left."
    assert text_preprocessing(text) == text
    assert run(tmp_path / "undo", made, scores="undo", clean=False)["text"][0].as_py() == "a hill"


def test_sentences_about_what_is_not_there_can_go(tmp_path):
    text = ["A hill. There is no tree on it. A man walks! He does not run.", "There are no people."]
    table = pa.table({"id": ["a", "b"], "text": text})
    made = run(tmp_path, table, drop_sentences="(is|are) no |does not ")
    assert made["text"].to_pylist() == ["A hill. A man walks!", ""]
    with pytest.raises(UserError, match="no regular expression"):
        run(tmp_path / "bad", table, drop_sentences="(")


@pytest.mark.parametrize("scores", ["numbers", "words", "fps"])
def test_scores_can_be_changed_and_undone(tmp_path, scores):
    once = run(tmp_path, scores=scores)
    other = run(tmp_path / "x", once, scores="numbers" if scores != "numbers" else "words")
    assert (
        other["text"].to_pylist()
        == run(tmp_path / "y", scores="numbers" if scores != "numbers" else "words")["text"].to_pylist()
    )
    assert run(tmp_path / "z", once, scores="undo", clean=False)["text"][1].as_py() == "A lake"
    assert SUFFIX.sub("", "The score is high.") == "The score is high."


def test_words_change_where_the_reference_says():
    for value, expected in (
        (3.99, "terrible"),
        (4, "very poor"),
        (4.5, "poor"),
        (5, "fair"),
        (5.5, "good"),
        (6, "very good"),
    ):
        assert word(value, AESTHETIC) == expected
    for value, expected in (
        (0.4, "very low"),
        (0.5, "low"),
        (2, "fair"),
        (5, "high"),
        (10, "very high"),
        (20, "extremely high"),
    ):
        assert word(value, MOTION) == expected


def test_a_share_of_phrases_is_dropped_the_same_way_each_time(tmp_path):
    count = 400
    table = pa.table(
        {"id": [str(k) for k in range(count)], "text": ["x."] * count, "aes": [5.0] * count, "flow": [1.0] * count}
    )
    first = run(tmp_path, table, scores="words", drop_share=0.2)["text"].to_pylist()
    again = run(tmp_path / "again", table, scores="words", drop_share=0.2)["text"].to_pylist()
    assert first == again
    for phrase in ("aesthetic score", "motion strength"):
        assert 0.14 < sum(phrase not in text for text in first) / count < 0.26
    with pytest.raises(UserError, match="needs the column text"):
        run(tmp_path / "t", table.drop_columns("text"), scores="none")
