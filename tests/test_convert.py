"""Checkpoints in and back out, every family to the bit; what is damaged or hostile is refused in one sentence."""

import json
import pickle
import shutil
import struct
import weakref
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax import convert
from opensora_jax.common.errors import UserError
from opensora_jax.weights import files

NOT_A_NETWORK = ("osp_ganloss", "vqvae_codebook_ema")  # a loss module, a codebook alone


def convertible(goldens):
    return [p.parent for p in sorted(goldens.glob("*/weights.safetensors")) if p.parent.name not in NOT_A_NETWORK]


def checkpoint(case, folder):
    """A case's weights as a Hugging Face folder."""
    description = json.loads((case / "case.json").read_text())
    folder.mkdir()
    shutil.copy(case / "weights.safetensors", folder / "model.safetensors")
    config = description["config"]
    (folder / "config.json").write_text(json.dumps(config.get("model", config.get("autoencoder_kl", config))))
    return folder


@pytest.fixture
def stdit3(goldens, tmp_path):
    return checkpoint(goldens / "v12_rflow_sample_a", tmp_path / "source")


def test_every_family_there_and_back_is_the_same_to_the_bit(goldens, tmp_path):
    families = set()
    for case in convertible(goldens):
        work = tmp_path / case.name
        work.mkdir()
        source = checkpoint(case, work / "source")
        assert convert.main([f"--from={source}", f"--to={work / 'ours'}"]) == 0
        shutil.rmtree(source)
        assert convert.main(["--to-torch", f"--from={work / 'ours'}", f"--to={work / 'back'}"]) == 0
        want, got = load_file(case / "weights.safetensors"), load_file(work / "back" / "model.safetensors")
        assert want.keys() == got.keys(), case.name
        for name, array in want.items():
            assert array.dtype == got[name].dtype
            np.testing.assert_array_equal(array, got[name], err_msg=f"{case.name}: {name}")
        families.add(json.loads((work / "ours" / "config.json").read_text())["family"])
    assert len(families) >= 12


def test_manifests_of_every_full_size_network(goldens, capsys):
    files = sorted((goldens.parent / "manifests").glob("*.json"))
    assert len(files) >= 30
    assert convert.main(["--manifest", *map(str, files)]) == 0
    assert capsys.readouterr().out.count("ok  ") == len(files)


def test_dtype_is_changed_on_request(stdit3, tmp_path):
    assert convert.main([f"--from={stdit3}", f"--to={tmp_path / 'ours'}", "--dtype=bfloat16"]) == 0
    from opensora_jax.weights.store import Folder

    ours = Folder(tmp_path / "ours")
    assert {ours.dtype(name).name for name in ours.shapes} == {"bfloat16"}


def test_shards_with_an_index(stdit3, tmp_path, monkeypatch):
    from opensora_jax.weights import store

    monkeypatch.setattr(store, "SHARD_BYTES", 60_000)
    assert convert.main([f"--from={stdit3}", f"--to={tmp_path / 'ours'}"]) == 0
    assert convert.main(["--to-torch", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}"]) == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert convert.main([f"--from={tmp_path / 'back'}", f"--to={tmp_path / 'again'}"]) == 0


def test_one_tensor_of_the_source_is_in_memory_at_a_time(goldens, tmp_path, monkeypatch):
    source, held = checkpoint(goldens / "v12_rflow_sample_a", tmp_path / "source"), []
    opened = files._open_safetensors

    def watched(path, config):
        found = opened(path, config)

        def read(name):
            assert sum(ref() is not None for ref in held) <= 1  # the one that was just written
            array = found.read(name)
            held.append(weakref.ref(array))
            return array

        return replace(found, read=read)

    monkeypatch.setattr(files, "_open_safetensors", watched)
    assert convert.main([f"--from={source}", f"--to={tmp_path / 'ours'}"]) == 0
    assert len(held) > 30


def refused(source, tmp_path, message, *flags):
    with pytest.raises(UserError, match=message) as caught:
        convert.main([f"--from={source}", f"--to={tmp_path / 'out'}", *flags])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    return str(caught.value)


def rewritten(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_what_does_not_fit_is_listed_by_name(stdit3, tmp_path):
    def change(weights):
        weights["spatial_blocks.0.attn.qkvv.weight"] = weights.pop("spatial_blocks.0.attn.qkv.weight")
        weights["t_block.1.bias"] = weights["t_block.1.bias"][:-1]

    source = rewritten(stdit3, lambda weights: weights.update(surplus=np.zeros(3, np.float32)))
    text = refused(source, tmp_path, "1 problem\n")
    assert "surplus" in text
    text = refused(rewritten(stdit3, change), tmp_path, "does not fit|lacks what tells", "--family=stdit3")
    assert "qkv" in text


def test_a_config_of_the_wrong_kind(goldens, tmp_path):
    source = checkpoint(goldens / "v13_vae_a", tmp_path / "source")
    (source / "config.json").write_text('{"encoder": "x"}')
    refused(source, tmp_path, "looks like video_vae_v13, but it or its config.json lacks")


def test_too_few_axes_are_listed(goldens, tmp_path):
    source = checkpoint(goldens / "osp_discriminator2d", tmp_path / "source")
    rewritten(source, lambda weights: weights.update({"main.2.weight": weights["main.2.weight"].reshape(-1)}))
    assert "main.2.weight: shape [2048], but main/2/kernel takes" in refused(source, tmp_path, "does not fit")


def test_a_number_is_no_part_of_a_layer(tmp_path):
    weights = dict.fromkeys(
        ("pos_embed.proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn2.to_q.weight"),
        np.float32([[1.0]]),
    )
    parts = {f"transformer_blocks.0.attn1.to_{part}.weight": np.array(1, np.float32) for part in "qkv"}
    (tmp_path / "source").mkdir()
    save_file(weights | parts, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"sample_size": 8}))
    refused(tmp_path / "source", tmp_path, "to_q.weight: a single number, not a part of blocks.0.attn.qkv.weight")


def test_nan_weights(stdit3, tmp_path):
    source = rewritten(stdit3, lambda w: w["t_block.1.bias"].__setitem__(0, np.nan))
    refused(source, tmp_path, "not all finite")


def test_integers_where_floats_belong(stdit3, tmp_path):
    source = rewritten(stdit3, lambda w: w.update({"t_block.1.bias": w["t_block.1.bias"].astype(np.int32)}))
    refused(source, tmp_path, "t_block.1.bias holds int32, but t_block/bias takes float32")


def test_what_float16_cannot_hold(stdit3, tmp_path):
    source = rewritten(stdit3, lambda w: w["t_block.1.bias"].__setitem__(0, 1e6))
    refused(source, tmp_path, "--dtype=float16 of .* not all finite", "--dtype=float16")


def test_ema_of_a_training_checkpoint(stdit3, tmp_path):
    """Open-Sora's own: model/ and beside it ema.safetensors."""
    folder = tmp_path / "epoch0-global_step10"
    shutil.copytree(stdit3, folder / "model")
    weights = load_file(stdit3 / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, folder / "ema.safetensors")
    for flags, factor in (((), 1), (("--ema",), 2)):
        target = tmp_path / f"ours{factor}"
        assert convert.main([f"--from={folder}", f"--to={target}", *flags]) == 0
        ours = load_file(target / "model.safetensors")
        np.testing.assert_array_equal(ours["t_block/bias"], factor * weights["t_block.1.bias"])
    refused(stdit3, tmp_path, "has no EMA weights", "--ema")


def test_cut_off_files(stdit3, tmp_path):
    path = stdit3 / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(stdit3, tmp_path, "cut off or damaged")
    path.write_bytes(whole[:4])
    refused(stdit3, tmp_path, "not a safetensors file")


def test_an_absurd_header(stdit3, tmp_path):
    path = stdit3 / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    refused(stdit3, tmp_path, "header claims")


def with_header(folder, header: bytes, data: bytes = bytes(4)):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE = {
    "a name twice": (f"{{{ONE},{ONE}}}", "a is there twice"),
    "an unknown dtype": (f"{{{ONE.replace('F32', 'F8_E9')}}}", "F8_E9, which is not supported"),
    "no JSON": ("{" + ONE, "header is damaged"),
    "a list": (f"[{{{ONE}}}]", "header is damaged"),
    "nothing but depth": ("[" * 100_000, "header is damaged"),
    "a tensor that is a number": ('{"a":1}', "header is damaged"),
    "no shape": ('{"a":{"dtype":"F32","data_offsets":[0,4]}}', "header is damaged"),
    "negative sides": (f"{{{ONE.replace('[1]', '[-1,-1]')}}}", "header is damaged"),
    "half a side": (f"{{{ONE.replace('[1]', '[1.0]')}}}", "header is damaged"),
    "three offsets": (f"{{{ONE.replace('[0,4]', '[0,2,4]')}}}", "header is damaged"),
    "offsets in words": (f"{{{ONE.replace('[0,4]', '[0,true]')}}}", "header is damaged"),
    "sides that overflow": (
        f"{{{ONE.replace('[1]', '[4294967296,4294967296]').replace('4]}', '0]}')}}}",
        "does not fit",
    ),
    "beyond the end": (f"{{{ONE.replace('[0,4]', '[4,8]')}}}", "does not fit"),
    "overlapping tensors": (f"{{{ONE},{ONE.replace('a', 'b', 1)}}}", "overlaps another tensor"),
    "bytes of nobody": (f"{{{ONE.replace('[0,4]', '[0,0]').replace('[1]', '[0]')}}}", "4 bytes belong to no tensor"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header(stdit3, tmp_path, kind):
    header, message = HOSTILE[kind]
    refused(with_header(stdit3, header.encode()), tmp_path, message)


INDICES = {
    "no table": ([], "holds a list"),
    "no map": ({"weight_map": 3}, "has no weight_map"),
    "a number for a file": ({"weight_map": {"a": 3}}, "has no weight_map"),
    "a file elsewhere": ({"weight_map": {"a": "../other/model.safetensors"}}, "not in its folder"),
    "a lost shard": ({"weight_map": {"a": "model-2.safetensors"}}, "is missing; the index"),
    "a lost tensor": ({"weight_map": {"lost": "model.safetensors"}}, "no shard holds, e.g. lost"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_a_hostile_index(stdit3, tmp_path, kind):
    content, message = INDICES[kind]
    (stdit3 / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(stdit3, tmp_path, message)


def test_a_layer_of_absurd_number(stdit3, tmp_path):
    """A name must not make us build a billion layers."""
    move = lambda w: w.update({"spatial_blocks.999999999.t": np.zeros(3, np.float32)})
    assert "spatial_blocks.999999999.t" in refused(rewritten(stdit3, move), tmp_path, "does not fit")


def test_the_target_is_no_file(stdit3, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file; choose a new folder"):
        convert.main([f"--from={stdit3}", f"--to={tmp_path / 'out'}"])
    assert (tmp_path / "out").read_text() == "mine"


def test_a_mislabelled_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, tmp_path, "not a safetensors file")


def test_a_missing_path_and_an_unknown_family(stdit3, tmp_path):
    refused(tmp_path / "none", tmp_path, "does not exist")
    refused(stdit3, tmp_path, "did you mean stdit3", "--family=stdit33")


def test_a_pickle_without_torch_names_the_extra(tmp_path, monkeypatch):
    import builtins

    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    real = builtins.__import__
    no_torch = lambda name, *args, **kwargs: (
        (_ for _ in ()).throw(ImportError) if name == "torch" else real(name, *args, **kwargs)
    )
    monkeypatch.setattr(builtins, "__import__", no_torch)
    refused(path, tmp_path, r"opensora-jax\[convert\]")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose only repository, org/name, holds a network in a folder; what is asked of it."""
    import huggingface_hub

    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_one_file_of_a_hub_repository(stdit3, tmp_path, hub):
    shutil.copytree(stdit3, tmp_path / "snapshot" / "part")
    for source in ("org/name/part", "org/name/part/model.safetensors"):
        target = tmp_path / source.replace("/", "_")
        assert convert.main([f"--from={source}", f"--to={target}"]) == 0
    assert [repository for repository, _ in hub] == ["org/name"] * 2
    assert hub[1][1] == ["part/model.safetensors", "part/model.safetensors/*", "part/config.json"]
    refused("org/name/other", tmp_path, "org/name has no other")


def test_a_file_of_the_hub_without_network_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refused("org/name/part/x.safetensors", tmp_path, "`hf download org/name part/x.safetensors`, copy it here")
    refused("org na me/x", tmp_path, "is no Hub id")


def test_the_target_must_be_new(stdit3, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="not empty"):
        convert.main([f"--from={stdit3}", f"--to={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "mine").exists()
