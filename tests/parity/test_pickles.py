"""PyTorch pickles, as training scripts leave them and as nobody should open them."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from opensora_jax import convert
from opensora_jax.common.errors import UserError

pytestmark = pytest.mark.parity


@pytest.fixture
def weights(goldens):
    return load_file(goldens / "v12_rflow_sample_a" / "weights.safetensors")


def tensors(weights, prefix="", scale=1.0):
    return {prefix + name: torch.from_numpy(array * np.float32(scale)) for name, array in weights.items()}


def converted(path, tmp_path, *flags):
    target = tmp_path / "ours"
    assert convert.main([f"--from={path}", f"--to={target}", *flags]) == 0
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"model": {"module." + name: value for name, value in t.items()}},
        lambda t: {"ema": t},
    ],
    ids=["plain", "state_dict", "module prefix", "ema alone"],
)
def test_wrappers(weights, tmp_path, wrap):
    torch.save(wrap(tensors(weights)), tmp_path / "x.pth")
    ours = converted(tmp_path / "x.pth", tmp_path)
    np.testing.assert_array_equal(ours["t_block/kernel"], weights["t_block.1.weight"].T)


def test_ema_is_taken_on_request(weights, tmp_path):
    torch.save({"model": tensors(weights), "ema": tensors(weights, scale=2.0)}, tmp_path / "x.pt")
    ours = converted(tmp_path / "x.pt", tmp_path, "--ema")
    np.testing.assert_array_equal(ours["t_block/kernel"], 2 * weights["t_block.1.weight"].T)


def test_bfloat16_and_sharded_bin(weights, tmp_path):
    import json

    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(weights)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, chosen in halves.items():
        torch.save({n: torch.from_numpy(weights[n]).bfloat16() for n in chosen}, folder / file)
    table = {name: file for file, chosen in halves.items() for name in chosen}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    ours = converted(folder, tmp_path)
    want = torch.from_numpy(weights["t_block.1.weight"]).bfloat16().float().numpy().T
    np.testing.assert_array_equal(ours["t_block/kernel"].astype(np.float32), want)


class Hostile:
    def __reduce__(self):
        return (open, ("hostile-was-here", "w"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2), "extra": Hostile()}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(UserError, match="cannot be opened"):
            convert.main([f"--from={tmp_path / name}", f"--to={tmp_path / 'ours'}"])
    assert not (tmp_path / "hostile-was-here").exists() and not (tmp_path / "ours").exists()


def test_a_cut_off_pickle(weights, tmp_path):
    torch.save(tensors(weights), tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        convert.main([f"--from={tmp_path / 'x.pth'}", f"--to={tmp_path / 'ours'}"])


def test_files_from_before_zip(weights, tmp_path):
    torch.save(tensors(weights), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    ours = converted(tmp_path / "x.pth", tmp_path)
    np.testing.assert_array_equal(ours["t_block/kernel"], weights["t_block.1.weight"].T)


def test_what_is_no_tensor_with_a_name_is_left_out(weights, tmp_path):
    torch.save(tensors(weights) | {0: torch.zeros(2), "epoch": 3, "note": "mine"}, tmp_path / "x.pth")
    assert "t_block/kernel" in converted(tmp_path / "x.pth", tmp_path)


ITSELF: dict = {}
ITSELF["model"] = ITSELF


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"t": torch.zeros(1).expand(1 << 40)}, "claims more numbers than the file holds"),
        ({"t": torch.eye(3).to_sparse()}, "is sparse"),
        (ITSELF, "holds no tensors"),
        ([1, 2], "holds a list"),
        ({"t_block.1.weight": torch.zeros(3, dtype=torch.complex64)}, "no family has such tensors"),
    ],
    ids=["a terabyte of one number", "sparse", "a table that holds itself", "a list", "complex"],
)
def test_odd_pickles(saved, message, tmp_path):
    torch.save(saved, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        convert.main([f"--from={tmp_path / 'x.pth'}", f"--to={tmp_path / 'ours'}"])
    assert not (tmp_path / "ours").exists()
