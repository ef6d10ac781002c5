"""Checkpoints of other publishers: diffusers' names of Flux convert to what FLUX.1's own convert to."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from opensora_jax import convert
from opensora_jax.weights import mmdit
from opensora_jax.weights.engine import swapped
from tests.checks import existing


def named_by_diffusers(weights: dict[str, np.ndarray], hidden: int) -> dict[str, np.ndarray]:
    """The joins, undone: q, k and v are as wide as the model, what follows them takes the rest."""
    named = {}
    for name, value in weights.items():
        join = next(j for j in mmdit.JOINS if re.fullmatch(re.escape(j.target).replace(r"\{n\}", r"\d+"), name))
        layer = (re.findall(r"\d+", name) or [""])[0]
        parts = np.split(value, [hidden * (i + 1) for i in range(len(join.sources) - 1)])
        if join.combine is swapped:
            parts = [swapped([value])]
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
