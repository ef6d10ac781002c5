"""Input and output on s3:// through a local server, and writes that are all or nothing."""

import os

import pytest

from data_pipelines import files, pipeline, synthetic, tables
from data_pipelines.pipeline import Options
from tests.data_pipelines.steps import step


@pytest.fixture(scope="module")
def bucket():
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    mine = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    mine["AWS_DEFAULT_REGION"] = "us-east-1"
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    import boto3

    boto3.client("s3").create_bucket(Bucket="videos")
    yield "s3://videos"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


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
    assert all(path.startswith("s3://videos/out/scene_cut/") for path in remote["path"].to_pylist())
    shards = [name for name in files.listing(f"{bucket}/out/pack") if name.endswith(".array_record")]
    assert len(shards) == 2 and files.exists(f"{bucket}/out/pack/manifest.json")
    assert tables.read(f"{bucket}/out/table.parquet").equals(remote)
    monkeypatch.setattr("data_pipelines.parts.perform", lambda *a: pytest.fail("finished work was repeated"))
    assert run(f"{bucket}/in", f"{bucket}/out").equals(remote)


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
