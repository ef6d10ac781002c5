"""Checkpoints of other publishers: diffusers' names of Flux and DiT become those of the authors, and theirs again."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax import convert
from opensora_jax.common.errors import UserError
from opensora_jax.weights import mmdit
from opensora_jax.weights.layouts import SWAPPED
from tests.checks import existing


def named_by_diffusers(weights: dict[str, np.ndarray], hidden: int) -> dict[str, np.ndarray]:
    """The joins, undone: q, k and v are as wide as the model, what follows them takes the rest."""
    named = {}
    for name, value in weights.items():
        join = next(j for j in mmdit.JOINS if re.fullmatch(re.escape(j.target).replace(r"\{n\}", r"\d+"), name))
        layer = (re.findall(r"\d+", name) or [""])[0]
        parts = np.split(value, [hidden * (i + 1) for i in range(len(join.sources) - 1)])
        if join.merge is SWAPPED:
            parts = [np.concatenate(np.split(value, 2)[::-1])]
        named |= {source.replace("{n}", layer): part for source, part in zip(join.sources, parts, strict=True)}
    return named


def test_flux_from_diffusers(goldens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = existing(goldens / "mmdit_fused_guidance_embednd")
    weights, config = load_file(case / "weights.safetensors"), json.loads((case / "case.json").read_text())["config"]
    theirs = named_by_diffusers(weights, config["hidden_size"])
    assert len(theirs) > len(weights) and not set(theirs) & set(weights)
    diffusers_config = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "axes_dims_rope": config["axes_dim"]}
    for folder, tensors, settings in (("own", weights, config), ("diffusers", theirs, diffusers_config)):
        Path(folder).mkdir()
        save_file(tensors, f"{folder}/model.safetensors")
        Path(folder, "config.json").write_text(json.dumps(settings))
        assert convert.main([f"--from={folder}", f"--to={folder}_converted"]) == 0
    own, joined = (load_file(f"{name}_converted/model.safetensors") for name in ("own", "diffusers"))
    assert set(own) == set(joined)
    for name, value in own.items():
        np.testing.assert_array_equal(joined[name], value, err_msg=name)
    configs = [json.loads(Path(f"{name}_converted/config.json").read_text()) for name in ("own", "diffusers")]
    assert configs[0] == configs[1]
    shutil.rmtree("diffusers")
    assert convert.main(["--to-torch", "--from=diffusers_converted", "--to=back"]) == 0
    back = load_file("back/model.safetensors")
    assert set(back) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert json.loads(Path("back/config.json").read_text()) == diffusers_config


@pytest.fixture
def dit():
    """Names and shapes of diffusers' DiT with two layers of width 4; the embedders are written with each layer."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    linear = lambda name, out, inputs: {f"{name}.weight": draw(out, inputs), f"{name}.bias": draw(out)}
    embedders = linear("timestep_embedder.linear_1", 4, 256) | linear("timestep_embedder.linear_2", 4, 4)
    embedders["class_embedder.embedding_table.weight"] = draw(8, 4)
    tensors = {"pos_embed.proj.weight": draw(4, 3, 2, 2), "pos_embed.proj.bias": draw(4)}
    for layer in range(2):
        block = {f"norm1.emb.{name}": value for name, value in embedders.items()} | linear("norm1.linear", 24, 4)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            block |= linear(f"attn1.{part}", 4, 4)
        block |= linear("ff.net.0.proj", 16, 4) | linear("ff.net.2", 4, 16)
        tensors |= {f"transformer_blocks.{layer}.{name}": value for name, value in block.items()}
    return tensors | linear("proj_out_1", 8, 4) | linear("proj_out_2", 24, 4)


def saved(tensors, folder, **config):
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CONFIG = dict(_class_name="DiTTransformer2DModel", sample_size=16, num_attention_heads=2, num_embeds_ada_norm=7)


def test_what_diffusers_says_and_does_otherwise_is_kept(dit, tmp_path):
    source = saved(dit, tmp_path / "dit", **CONFIG)
    assert convert.main([f"--from={source}", f"--to={tmp_path / 'ours'}"]) == 0
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = {"family": "dit", "condition": "label_7", "base_size": 8, "frequency_shift": 1, "mlp_norm_eps": 1e-5}
    assert {key: config[key] for key in expected} == expected
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    values = [dit[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"]
    np.testing.assert_array_equal(ours["blocks/attn/qkv/kernel"][1], np.concatenate(values).T)


def test_copies_that_differ_are_refused(dit, tmp_path):
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    source = saved(dit | {name: dit[name] + 1}, tmp_path / "dit", **CONFIG)
    with pytest.raises(UserError, match=r"class_embedder.*should be the same tensor"):
        convert.main([f"--from={source}", f"--to={tmp_path / 'ours'}"])
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize(
    "config, message",
    [({}, "needs the config.json"), (CONFIG | {"activation_fn": "geglu"}, "activation_fn='geglu' is not served")],
)
def test_what_the_config_must_say(dit, tmp_path, config, message):
    source = saved(dit, tmp_path / "dit", **config)
    with pytest.raises(UserError, match=message):
        convert.main([f"--from={source}", f"--to={tmp_path / 'ours'}"])
