"""Conditions over columns, and the report of what each removed."""

import pyarrow as pa
import pytest

from data_pipelines.expression import Expression
from data_pipelines.filter import STAGE, Tally
from opensora_jax.common.errors import UserError

TABLE = pa.table(
    {
        "id": list("abcdef"),
        "aes": [4.0, 5.0, 6.0, None, 5.5, 7.0],
        "num_frames": [10, 20, 30, 40, 50, 60],
        "fps": [24.0, 30.0, 60.0, 24.0, 25.0, 24.0],
        "text": ["a cat", "the LOGO", "", None, "dog", "cats and dogs"],
        "black": [False, False, True, False, False, False],
    }
)


@pytest.mark.parametrize(
    "condition, kept",
    [
        ("aes >= 5", "bcef"),
        ("aes >= 5 and num_frames < 50", "bc"),
        ("not black and (aes < 5 or aes > 6.5)", "af"),
        ("20 <= num_frames <= 40", "bcd"),
        ("num_frames / fps > 1", "def"),
        ("num_frames % 20 == 0", "bdf"),
        ("-aes + 10 > abs(-4)", "abe"),
        ("fps in (24, 25)", "adef"),
        ("text not in ('dog',)", "abcf"),
        ("contains(lower(text), 'logo')", "b"),
        ("len(text) > 0", "abef"),
        ("matches(text, '^cat|^dog')", "ef"),
        ("is_null(aes)", "d"),
        ("startswith(text, 'the') or endswith(text, 'dogs')", "bf"),
        ("black", "c"),
    ],
)
def test_conditions(condition, kept):
    assert "".join(TABLE.filter(Expression(condition).mask(TABLE))["id"].to_pylist()) == kept


@pytest.mark.parametrize(
    "condition, message",
    [
        ("aess >= 5", "there is no column aess; did you mean aes?"),
        ("aes >=", "cannot be read"),
        ("__import__('os')", "is none of"),
        ("text.upper() == 'A'", "is none of|not supported"),
        ("[x for x in aes]", "not supported"),
        ("aes + 1", "compare it with something"),
        ("text > 5", "does not fit the columns"),
        ("(lambda: 1)()", "is none of"),
    ],
)
def test_wrong_conditions_name_what_is_wrong(condition, message):
    with pytest.raises(UserError, match=message):
        Expression(condition).mask(TABLE)


def test_the_report_says_what_each_condition_removed():
    stage = STAGE(STAGE.Config(keep=("aes >= 5", "num_frames <= 50", "not black")))
    kept, report = stage.table(TABLE)
    assert kept["id"].to_pylist() == ["b", "e"] and (report["rows"], report["kept"]) == (6, 2)
    assert [(c["fails"], c["missing"], c["only"]) for c in report["conditions"]] == [(2, 1, 2), (1, 0, 1), (1, 0, 1)]
    assert report["lines"][0] == "aes >= 5: 2 of 6 fail (2 only here, 1 of them have no value)"


def test_a_filter_that_removes_everything_says_why():
    with pytest.raises(UserError, match=r"removes every row: aes > 100: 6 of 6 fail \(4 only here, 1 of them"):
        STAGE(STAGE.Config(keep=("aes > 100", "num_frames > 20"))).table(TABLE)
    kept, _ = STAGE(STAGE.Config(keep=("aes > 100",), allow_empty=True)).table(TABLE)
    assert kept.num_rows == 0


def test_pieces_add_up_to_the_whole():
    whole, parts = Tally(("aes >= 5", "not black")), Tally(("aes >= 5", "not black"))
    whole.add(TABLE)
    for k in range(0, 6, 2):
        parts.add(TABLE.slice(k, 2))
    assert parts.report() == whole.report()
