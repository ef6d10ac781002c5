"""Live: our text-to-video Latte against diffusers' LatteTransformer3DModel, under the same names."""

import jax
import numpy as np
import pytest
import torch
from diffusers import LatteTransformer3DModel

from tests.parity import live

pytestmark = pytest.mark.parity


def test_latte():
    """Without a text mask: diffusers' own handling of one fails on clips."""
    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12, video_length=4,
    )  # fmt: skip
    net, params = live.ours(model, "models", "latte_t2v")
    x, y = live.normal(2, 4, 4, 8, 8), live.normal(2, 5, 12, seed=1)
    t = np.float32([3, 700])
    with torch.no_grad():
        out = model(*map(torch.from_numpy, (x, t, y))).sample
    ours = jax.jit(lambda p, x, t, y: net(p, x, t, y))(params, np.moveaxis(x, 1, -1), t, y)
    live.close(np.moveaxis(np.asarray(ours), -1, 1), out, 2e-5)
