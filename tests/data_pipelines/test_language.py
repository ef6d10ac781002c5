"""The language of captions, and what happens where the library is not installed."""

import sys

import pyarrow as pa
import pytest

from data_pipelines import pipeline
from data_pipelines.pipeline import Options
from opensora_jax.common.errors import UserError
from tests.data_pipelines.steps import step

ENGLISH = ("A red car drives past a house.", "Two dogs running.", "Woman in kimono walking through Kyoto, Japan")
OTHERS = {"de": "Ein rotes Auto fährt an einem Haus vorbei.", "es": "Dos perros corriendo en la playa"}
OTHERS |= {"zh": "一辆红色汽车驶过一座房子。", "ru": "Красная машина проезжает мимо дома."}


def run(tmp_path, texts, **options):
    table = pa.table({"id": [f"{k}" for k in range(len(texts))], "text": pa.array(texts, pa.string())})
    return pipeline.run([step("language", **options)], table, Options(str(tmp_path), quiet=True))


def test_english_is_kept_and_the_rest_is_told(tmp_path):
    pytest.importorskip("py3langid")
    made = run(tmp_path, [*ENGLISH, *OTHERS.values(), "", None]).to_pylist()
    assert [row["language"] for row in made] == ["en"] * 3 + list(OTHERS) + [None, None]
    kept = [row["language_match"] is not None and row["language_match"] >= 0.02 for row in made]
    assert kept == [True] * 3 + [False] * 6
    assert run(tmp_path / "de", [OTHERS["de"]], wanted="de")["language_match"][0].as_py() > 0.9
    with pytest.raises(UserError, match=r"language.wanted must be one of .*de.*, not english"):
        run(tmp_path / "x", ["a"], wanted="english")


def test_without_the_library_it_refuses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r'pip install "opensora-jax\[data\]"'):
        run(tmp_path, ["a"])
