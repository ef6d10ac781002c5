"""Live: our DiT and PixArt against diffusers' DiTTransformer2DModel and PixArtTransformer2DModel, under their names."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.numpy import load_file

from opensora_jax import convert
from tests.parity import live

pytestmark = pytest.mark.parity

SMALL = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, patch_size=2)


def dit():
    model = DiTTransformer2DModel(**SMALL, sample_size=8, num_embeds_ada_norm=10)
    live.weights_of(model)
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for other in others:  # as released: one embedder, written with every layer
        other.load_state_dict(first.state_dict())
    return model


def pixart(**options):
    return PixArtTransformer2DModel(**SMALL, cross_attention_dim=24, caption_channels=10, **options)


def images(out):
    return np.moveaxis(np.asarray(out), -1, 2)[:, 0]


@pytest.mark.parametrize("side", [8, 12], ids=["size of training", "larger"])
def test_dit(side):
    model = dit()
    net, params = live.ours(model, "models", "dit", weights=live.tensors(model))
    x, t, y = live.normal(3, 4, side, side), np.float32([3, 500, 999]), np.int32([0, 7, 10])
    with torch.no_grad():
        out = model(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y).long()).sample
    ours = jax.jit(net.__call__)(params, np.moveaxis(x, 1, -1)[:, None], t, y)
    live.close(images(ours), out)


@pytest.mark.parametrize(
    "options",
    [
        dict(sample_size=8, interpolation_scale=0.5),
        dict(
            sample_size=128, num_attention_heads=3, cross_attention_dim=36
        ),  # sizes and aspect ratios, positions of 1024 px
    ],
    ids=["sigma at 256 px", "alpha at 1024 px"],
)
def test_pixart(options):
    model = PixArtTransformer2DModel(**SMALL | dict(cross_attention_dim=24, caption_channels=10) | options)
    net, params = live.ours(model, "models", "pixart")
    x, y = live.normal(2, 4, 8, 12), live.normal(2, 5, 10, seed=2)
    t, mask = np.float32([3, 700]), np.int32([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    sizes = {"height": np.float32([64, 64]), "width": np.float32([96, 96]), "ar": np.float32([2 / 3, 2 / 3])}
    if not model.use_additional_conditions:
        sizes = {}
    conditions = {"resolution": None, "aspect_ratio": None}
    if sizes:
        resolution = np.stack([sizes["height"], sizes["width"]], -1)
        conditions = {
            "resolution": torch.from_numpy(resolution),
            "aspect_ratio": torch.from_numpy(sizes["ar"][:, None]),
        }
    with torch.no_grad():
        out = model(
            torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(t), conditions,
            encoder_attention_mask=torch.from_numpy(mask),
        ).sample  # fmt: skip
    ours = jax.jit(net.__call__)(params, np.moveaxis(x, 1, -1)[:, None], t, y, mask, **sizes)
    live.close(images(ours), out)


@pytest.mark.parametrize("make", [dit, lambda: pixart(sample_size=8)], ids=["dit", "pixart"])
def test_a_folder_that_diffusers_saved_goes_there_and_back(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "theirs")
    want = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    assert convert.main([f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'ours'}"]) == 0
    assert convert.main(["--to-torch", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}"]) == 0
    got = load_file(tmp_path / "back" / "model.safetensors")
    assert want.keys() == got.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(array, got[name], err_msg=name)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["_class_name"] == type(model).__name__
