"""Input and output on s3:// and gs:// through local stand-ins, and writes that are all or nothing."""

import os

import numpy as np
import pytest

from data_pipelines import files, pipeline, synthetic, tables
from data_pipelines.pipeline import Options
from opensora_jax.data.loader import DataConfig, make_loader
from tests.data_pipelines.steps import step


def moto():
    """S3 as AWS serves it, from this machine; the real driver speaks to it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    import boto3
    from etils.epath import backend
    from fsspec.config import conf

    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket="videos")
    forget = type(backend.fsspec_backend)._get_filesystem.cache_clear  # epath's driver may know another server
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conf, "s3", {"endpoint_url": address, "key": "x", "secret": "x"})
        yield "s3://videos"
    forget()
    server.stop()


def drawer(folder):
    """A folder under gs://, where Google's driver would be."""
    from etils.epath import backend
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.registry import _registry

    class StandIn(DirFileSystem):
        protocol = ("gs", "gcs")

        def __init__(self, **_):
            super().__init__(path=str(folder), fs=LocalFileSystem(auto_mkdir=True))

    with pytest.MonkeyPatch.context() as patch:
        for name in StandIn.protocol:
            patch.setitem(_registry, name, StandIn)
        patch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: StandIn())
        yield "gs://videos"


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, tmp_path_factory):
    yield from moto() if request.param == "s3" else drawer(tmp_path_factory.mktemp("gs"))


STEPS = [
    step("probe"),
    step("usable", "filter", keep=("status == 'ok'",)),
    step("scene_cut", preset="ultrafast"),
    step("fingerprint"),
    step("dedup"),
    step("pack", records_per_shard=2),
]


def test_a_pipeline_from_bucket_to_bucket(bucket, tmp_path, monkeypatch):
    synthetic.plain(str(tmp_path / "in"), 3)
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no")
    for name in files.listing(str(tmp_path / "in")):
        files.write_bytes(files.join(bucket, "in", os.path.basename(name)), files.read_bytes(name))
    run = lambda source, output: pipeline.run(STEPS, tables.read_input(source), Options(output, quiet=True, workers=2))
    remote = run(f"{bucket}/in", f"{bucket}/out")
    local = run(str(tmp_path / "in"), str(tmp_path / "out"))
    for column in ("id", "source", "num_frames", "phash", "shard", "record"):
        assert remote[column].to_pylist() == local[column].to_pylist(), column
    assert all(path.startswith(f"{bucket}/out/scene_cut/") for path in remote["path"].to_pylist())
    shards = [name for name in files.listing(f"{bucket}/out/pack") if name.endswith(".array_record")]
    assert len(shards) == 2 and files.exists(f"{bucket}/out/pack/manifest.json")
    assert tables.read(f"{bucket}/out/table.parquet").equals(remote)
    monkeypatch.setattr("data_pipelines.parts.perform", lambda *a: pytest.fail("finished work was repeated"))
    assert run(f"{bucket}/in", f"{bucket}/out").equals(remote)
    monkeypatch.setenv("OPENSORA_JAX_CACHE", str(tmp_path / "cache"))
    shape = {"batch_size": 3, "num_frames": 17, "height": 32, "width": 32}
    there, here = (next(make_loader(DataConfig(source=f"{at}/out/pack", **shape))) for at in (bucket, tmp_path))
    assert there[1].ids == here[1].ids and np.array_equal(there[0]["video"], here[0]["video"])


def test_pieces_and_reports_on_a_bucket(bucket, tmp_path):
    from data_pipelines import analyze

    table = tables.pa.table({"id": list("abc"), "flow": [1.0, 2.0, 4.0]})
    tables.write_parquet(table, f"{bucket}/meta/rows.parquet")
    source = tables.Pieces(f"{bucket}/meta")
    facts = analyze.report(analyze.summarise(source, ["flow"]), f"{bucket}/report", "flow")
    assert facts["flow"]["rows"] == 3 and facts["flow"]["max"] == 4.0
    assert files.exists(f"{bucket}/report/flow.png") and files.exists(f"{bucket}/report/report.html")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = str(tmp_path / "x.bin")
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as local:
        with open(local, "wb") as handle:
            handle.write(b"half")
        raise RuntimeError
    assert files.read_bytes(path) == b"old" and os.listdir(tmp_path) == ["x.bin"]
    assert oct(os.stat(path).st_mode)[-3:] == "644"
