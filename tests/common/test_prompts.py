"""Prompt grammar and caption cleaning; the recorded tables of every version are replayed by tests/verify."""

import pytest

from opensora_jax.common import prompts
from opensora_jax.common.errors import UserError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Cat&#39;s <b>day</b> at www.example.com/x", "a cat's day at"),
        ("this-is-my_cute-cat_photo.png", ""),
        ("\u300cmt fuji\u300d \u5bcc\u58eb\u5c71", "\u300cmt fuji\u300d"),
        ("(free shipping) mug no. 1234567!!!", "mug no. !!!"),
        ("dashes \u2013 and \u2014 quotes \u201ca\u201d", 'dashes - and - quotes "a"'),
    ],
)
def test_cleaning(raw, clean):
    assert prompts.text_preprocessing(raw) == clean
    assert prompts.text_preprocessing(raw, clean=False) == raw.lower().strip()


def test_broken_unicode_is_repaired():
    assert prompts.basic_clean(" schÃ¶n &amp;amp; ") == "schön &"


def test_scores_are_added_once():
    said = prompts.append_scores("a cat", aes=6.5, flow="4", camera_motion="pan left")
    assert said == "a cat aesthetic score: 6.5. motion score: 4.0. camera motion: pan left."
    assert prompts.append_scores(said, aes=1, flow=1, camera_motion="static") == said
    words = prompts.append_scores("a cat", aes="good", flow=30, version="1.3")
    assert words == "a cat The aesthetic score is good. The motion strength is extremely high."
    with pytest.raises(UserError, match="numbers"):
        prompts.append_scores("a cat", aes="good")
    told = prompts.append_scores(" a cat ", fps=24.0, flow=4, version="2.0")
    assert told == "a cat. 24 FPS. 4 motion score." and prompts.append_scores(told, flow="4", version="2.0") == told
    with pytest.raises(UserError, match="are unknown; choose"):
        prompts.append_scores("a cat", version="1.4")


def test_prompts_over_loops():
    prompt = "|0|a day|2|a night"
    assert prompts.split_prompt(prompt) == (["a day", "a night"], [0, 2])
    assert prompts.merge_prompt(*prompts.split_prompt(prompt)) == prompt
    assert [prompts.prompt_for_loop(prompt, loop) for loop in range(4)] == ["a day", "a day", "a night", "a night"]
    assert prompts.prompts_per_loop(prompt, 3) == ["a day", "a day", "a night"]
    for wrong in ("|0|a|b|c", "|0|a|2", "|0|a|2|b|1|c"):
        with pytest.raises(UserError):
            prompts.split_prompt(wrong)
    with pytest.raises(UserError, match="loop 2"):
        prompts.prompts_per_loop(prompt, 1)


def test_json_suffix():
    assert prompts.split_json('a cat{"mask_strategy": "0"}') == ("a cat", {"mask_strategy": "0"})
    for wrong, words in [
        ('a{"foo": 1}', "unknown key 'foo'"),
        ('a{"mask_strategy": "0"}{}', "more than one"),
        ("a{b", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=words):
            prompts.split_json(wrong)


def test_names_and_sizes():
    assert prompts.save_name(index=3, num_samples=2, sample=1) == "sample_0003-1"
    assert prompts.save_name("a/b" * 40, prompt_as_name=True) == ("a_b" * 40)[:50]
    assert prompts.pixel_frames(10) == 34
    assert prompts.size_conditions((720, 1280), 1, 24) == {
        "height": [720], "width": [1280], "num_frames": [1], "ar": [0.5625], "fps": [120],
    }  # fmt: skip
