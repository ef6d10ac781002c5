"""The Ray runner against the local one on the same stages: one cluster for all tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipelines import files, parts, pipeline, runner_ray, tables
from data_pipelines.pipeline import Options
from data_pipelines.probe import Probe
from tests.data_pipelines.steps import step, tree

pytestmark = pytest.mark.ray
STEPS = [
    step("probe"),
    step("usable", "filter", keep=("status == 'ok'",)),
    step("scene_cut", preset="ultrafast", detectors=("adaptive", "threshold")),
    step("fingerprint"),
    step("dedup"),
    step("pack", records_per_shard=9),
]
ROOT = str(Path(__file__).parents[2])

# A stage of the tests: it notes its rows, can be slow, and can die with its worker.
DEADLY = """
import dataclasses, os, time
import pyarrow as pa
from data_pipelines.stage import Stage

class Deadly(Stage):
    columns_in = ("path",)
    columns_out = {"length": pa.int64()}
    batch_size = 3

    @dataclasses.dataclass(frozen=True)
    class Config:
        log: str
        dies_once: str = ""
        pause: float = 0.0

    def row(self, row):
        time.sleep(self.config.pause)
        mark = self.config.log + ".died"
        if row["id"] == self.config.dies_once and not os.path.exists(mark):
            open(mark, "w").close()
            os._exit(1)
        with open(self.config.log, "a") as log:
            log.write(row["id"] + "\\n")
        return {"length": len(row["path"])}

STAGE = Deadly
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    ray = pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("modules")
    (folder / "deadly_stage.py").write_text(DEADLY)
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), ROOT, before]))
    runner_ray.connect(None)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    sys.path.remove(str(folder))
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_both_runners_write_the_same_files(cluster, corpus, tmp_path):
    results = []
    for runner in ("local", "ray"):
        pipeline.run(
            STEPS, tables.read_input(corpus[0]), Options(str(tmp_path / "out"), runner=runner, quiet=True, workers=1)
        )
        results.append(tree(tmp_path / "out"))
        os.rename(tmp_path / "out", tmp_path / runner)
    assert results[0].keys() == results[1].keys() and "table.parquet" in results[0]
    assert results[0] == results[1]


def rows(count):
    return pa.table({"id": [f"row{k:02d}" for k in range(count)], "path": ["x" * k for k in range(count)]})


def deadly(log, **options):
    import deadly_stage

    from data_pipelines.stage import configure

    return pipeline.Step("deadly", deadly_stage.Deadly, configure(deadly_stage.Deadly, {"log": str(log), **options}))


def test_a_killed_worker_loses_nothing(cluster, tmp_path):
    plan = [deadly(tmp_path / "log", dies_once="row04")]
    made = pipeline.run(plan, rows(12), Options(str(tmp_path / "out"), runner="ray", quiet=True, workers=1))
    assert made["length"].to_pylist() == list(range(12)) and os.path.exists(f"{tmp_path}/log.died")
    seen = (tmp_path / "log").read_text().split()
    assert set(seen) == set(rows(12)["id"].to_pylist())
    assert [name for name in seen if seen.count(name) > 1] in ([], ["row03", "row03"]), (
        "only the batch that died is redone"
    )


DRIVER = """
import sys
sys.path[:0] = {path!r}
from tests.data_pipelines.test_ray import deadly, rows
from data_pipelines import pipeline
from data_pipelines.pipeline import Options
pipeline.run([deadly({log!r}, pause=0.15)], rows(30), Options({out!r}, runner="ray", ray_address={address!r}, quiet=True, workers=1))
"""


def test_a_killed_driver_resumes(cluster, tmp_path):
    log, out = str(tmp_path / "log"), str(tmp_path / "out")
    code = DRIVER.format(path=[p for p in sys.path if p], log=log, out=out, address=cluster)
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    folder = os.path.join(out, "meta", "00_deadly")
    deadline = time.monotonic() + 300
    while not (os.path.isdir(folder) and len(files.listing(folder, (".parquet",))) >= 2):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1.0)  # its actors fall with it
    _, done, _ = parts.read(folder, deadly(log).stage.schema(), "id")
    assert 0 < len(done) < 30
    os.unlink(log)
    made = pipeline.run([deadly(log, pause=0.15)], rows(30), Options(out, runner="ray", quiet=True, workers=1))
    assert made["length"].to_pylist() == list(range(30))
    assert sorted([*done, *Path(log).read_text().split()]) == rows(30)["id"].to_pylist(), "finished work was repeated"


def test_a_row_that_kills_every_worker_becomes_an_error(tmp_path, monkeypatch):
    """What the next worker does with the notes of the dead; no cluster needed."""
    worker = runner_ray.Worker(Probe, Probe.Config(), str(tmp_path / "parts"), str(tmp_path / "notes"))
    batch = pa.table({"id": ["a", "b", "c"], "path": ["none", "poison", "none"]})
    calls = []

    def row(self, row):
        calls.append(row["id"])
        if row["path"] == "poison":
            raise SystemExit
        return {"status": "ok"}

    monkeypatch.setattr(Probe, "row", row)
    for _ in range(2):
        with pytest.raises(SystemExit):
            worker(batch)
    assert worker(batch).to_pylist() == [{"rows": 3, "errors": 1, "example": runner_ray.DIED}]
    made, done, errors = parts.read(str(tmp_path / "parts"), Probe.schema(), "id")
    assert made["id"].to_pylist() == ["a", "c"] and set(done) == {"a", "c"} and list(errors) == ["b"]
    assert calls == ["a", "b", "a", "b", "a", "c"] and not os.listdir(tmp_path / "notes")
