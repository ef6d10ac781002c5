"""Rows that fail: written down, counted, and over a stated share the end of the run."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import parts, pipeline
from data_pipelines.pipeline import Options, Step
from data_pipelines.stage import Stage, configure, convert, find
from opensora_jax.common.errors import UserError


class Fragile(Stage):
    """Fails on every row whose number is divisible by `every`; makes as many rows as its number says when told."""

    columns_in = ("number",)
    columns_out = {"half": pa.float64()}
    batch_size = 4

    @dataclasses.dataclass(frozen=True)
    class Config:
        every: int = 10

    def row(self, row):
        if row["number"] % self.config.every == 0:
            raise ValueError(f"cannot read {row['number']}")
        return {"half": row["number"] / 2}


def run(tmp_path, every, count=200, **options):
    table = pa.table({"id": [f"{k:03d}" for k in range(1, count + 1)], "number": range(1, count + 1)})
    return pipeline.run(
        [Step("fragile", Fragile, Fragile.Config(every))], table, Options(str(tmp_path), quiet=True, **options)
    )


def test_failed_rows_are_written_down_and_the_rest_goes_on(tmp_path):
    made = run(tmp_path, every=20)
    assert made.num_rows == 190 and made["half"][0].as_py() == 0.5
    lost = pq.read_table(tmp_path / "rejected" / "00_fragile.parquet").to_pylist()
    assert len(lost) == 10 and lost[0]["error"] == "ValueError: cannot read 20"


def test_too_many_failures_stop_the_run_and_say_why(tmp_path):
    with pytest.raises(
        UserError, match=r"fragile: 1\d of \d+ rows failed.*max_error_share=0.1; one of them: ValueError: cannot"
    ):
        run(tmp_path / "a", every=3)
    assert run(tmp_path / "b", every=3, max_error_share=0.5).num_rows == 134
    with pytest.raises(UserError, match="3 of 3 rows failed"):
        run(tmp_path / "c", every=1, count=3)


def test_new_rows_are_all_that_a_second_run_does(tmp_path):
    seen = []
    run(tmp_path, every=1000, count=10)
    real = parts.perform
    parts.perform = lambda stage, batch, folder: seen.extend(batch["id"].to_pylist()) or real(stage, batch, folder)
    try:
        assert run(tmp_path, every=1000, count=13).num_rows == 13
    finally:
        parts.perform = real
    assert sorted(seen) == ["011", "012", "013"]


def test_options_are_read_as_they_are_annotated():
    @dataclasses.dataclass(frozen=True)
    class Config:
        names: tuple[str, ...] = ()
        most: int | None = None
        on: bool = False

    stage = type("Some", (Stage,), {"Config": Config, "__module__": "some"})
    made = configure(stage, {"names": "a,b", "most": "3", "on": "true"})
    assert made == Config(("a", "b"), 3, True)
    assert configure(stage, {"names": '["x, y"]', "most": "none"}) == Config(("x, y",), None, False)
    with pytest.raises(UserError, match="must be bool, not 'maybe'"):
        convert("maybe", bool, "some.on")
    with pytest.raises(UserError, match="has no option name; did you mean names"):
        configure(stage, {"name": "a"})
    with pytest.raises(UserError, match="no stage called flaw; did you mean flow"):
        find("flaw")
