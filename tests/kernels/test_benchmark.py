"""The bookkeeping of benchmarks.attention: ratios, the verdict on the automatic choice, the table of block sizes."""

import json

import pytest

from benchmarks import attention as benchmark
from benchmarks.attention_runs import TUNED, alternatives
from opensora_jax.kernels import blocks as block_table
from opensora_jax.kernels import spec
from opensora_jax.plan.chips import CHIPS
from tests.kernels.cases import BY_NAME

CASE = BY_NAME["v2.0 joint 256px"]


def record(candidate, forward, backward, case=CASE, **more):
    return {"case": case.name, "candidate": candidate} | benchmark.rates(case, forward / 1e3, backward / 1e3) | more


def test_shares_of_peaks_and_ratios():
    records = [record("auto", 2.0, 5.0), record("cudnn", 1.0, 5.0), record("torch flash", 0.5, 1.0)]
    records.append({"case": CASE.name, "candidate": "pallas_tpu", "refused": "needs a TPU"})
    benchmark.compare(records, CHIPS["h200"])
    assert records[0]["forward_ratio"] == pytest.approx(2.0)  # torch's is no choice
    assert records[0]["both_ratio"] == pytest.approx(7 / 6)
    assert records[1]["forward_of_peak"] == pytest.approx(CASE.flops() / 1e-3 / 989e12)
    assert benchmark.markdown(records).count("\n") == 6


def test_the_verdict_names_what_is_slower_and_what_is_missing():
    other = BY_NAME["DiT image 512px"]
    records = [record("auto", 1.04, 3.0), record("cudnn", 1.0, 3.0)]
    records.append({"case": other.name, "candidate": "auto", "refused": "out of time"})
    benchmark.compare(records, CHIPS["h200"])
    assert benchmark.slower_than_need_be(records) == [f"{other.name}: not measured"]
    records = [record("auto", 1.0, 9.0), record("cudnn", 1.0, 3.0)]
    benchmark.compare(records, CHIPS["h200"])
    assert benchmark.slower_than_need_be(records) == [
        f"{CASE.name}: the automatic choice takes 2.50 of the fastest, with backward"
    ]


def test_the_fastest_correct_blocks_reach_the_kernels(tmp_path, monkeypatch):
    file = tmp_path / "blocks.json"
    file.write_text(block_table.FILE.read_text())
    monkeypatch.setattr(block_table, "FILE", file)
    block_table.table.cache_clear()
    blocks = lambda n: {"kernel": "mosaic_gpu", "forward": (n, 2), "dkv": (n // 2, 2)}
    records = [record("a", 2.0, 1.0, blocks=blocks(64)), record("b", 1.0, 2.0, blocks=blocks(128))]
    records.append(record("c", 0.5, 0.5, blocks=blocks(96), correct=False))
    block_table.write(benchmark.fastest_blocks(records, "hopper"))
    find = lambda stage, length: block_table.find("mosaic_gpu", stage, 128, length)
    with spec.target("hopper"):
        assert (find("forward", CASE.keys), find("dkv", 100)) == ((128, 2), (32, 2))
        assert find("forward", CASE.keys + 1) == (128, 2)  # the row for any chip
    block_table.write(
        [json.loads(json.dumps(row)) | {"blocks": [160, 2]} for row in benchmark.fastest_blocks(records, "hopper")]
    )
    with spec.target("hopper"):
        assert find("forward", CASE.keys) == (160, 2)
    monkeypatch.undo()
    block_table.table.cache_clear()


@pytest.mark.parametrize("name", TUNED)
def test_other_block_sizes_differ_from_each_other(name):
    case = BY_NAME[name]
    runs, blocks = alternatives(case, {"kv_lengths": None} if not case.fused else {"num_heads": 16, "mode": case.kind})
    assert runs.keys() == blocks.keys()
    passes = {
        kernel: [b for b in blocks.values() if b["kernel"] == kernel]
        for kernel in {b["kernel"] for b in blocks.values()}
    }
    for kernel, tried in passes.items():
        assert len(tried) > 1 and len({str(b) for b in tried}) == len(tried), kernel
        assert all(b.keys() == tried[0].keys() for b in tried)
