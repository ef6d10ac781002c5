"""The scoring CLIP of data_pipelines against transformers' CLIPModel, live."""

import numpy as np
import pytest

from data_pipelines.clip import Clip, preprocess, text_features
from tests.data_pipelines.test_clip import folder  # noqa: F401

pytestmark = pytest.mark.parity


def test_both_towers(folder):  # noqa: F811
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), rng.integers(0, 256, (64, 28, 3), dtype=np.uint8)]
    clip = Clip(str(folder))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    ours = np.stack([preprocess(picture, 28) for picture in pictures]).transpose(0, 3, 1, 2)
    assert np.abs(ours - pixels.numpy()).max() < 1e-5
    ids = rng.integers(3, 60, (2, 12))
    ids[0, 7:], ids[1, 11] = 63, 63
    with torch.no_grad():
        images = model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T
        texts = model.text_model(torch.from_numpy(ids)).pooler_output @ model.text_projection.weight.T
    images = images.numpy() / np.linalg.norm(images.numpy(), axis=1, keepdims=True)
    assert np.abs(clip.images(pictures) - images).max() < 1e-5
    weights = {k: v for k, v in clip.weights.items() if k.startswith("text_")}
    theirs = texts.numpy()
    assert (
        np.abs(np.asarray(text_features(weights, ids, clip.text)) - theirs).max() < 1e-5 * np.abs(theirs).max() + 1e-5
    )
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())
