"""Live: our MMDiT against diffusers' Flux transformer, read under diffusers' own names."""

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from opensora_jax.common.packing import position_ids
from tests.parity import live

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_flux(guided):
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=guided, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    net, params = live.ours(model, "models", "mmdit")
    ids = position_ids(1, (1, 4, 6), 1)
    given = {
        "img": live.normal(2, 24, 16), "txt": live.normal(2, 5, 24, seed=2), "y_vec": live.normal(2, 12, seed=3),
        "t": np.float32([0.3, 0.9]),
    }  # fmt: skip
    extra = {"guidance": np.float32([3.5, 7.0])} if guided else {}
    theirs = {name: torch.from_numpy(value) for name, value in (given | extra).items()}
    with torch.no_grad():
        out = model(
            theirs["img"], theirs["txt"], theirs["y_vec"], theirs["t"], torch.from_numpy(ids[0].copy()),
            torch.zeros(5, 3), theirs.get("guidance"),
        ).sample  # fmt: skip
    txt_ids = np.zeros((1, 5, 3), np.float32)
    forward = jax.jit(lambda p, inputs: net(p, img_ids=ids, txt_ids=txt_ids, method="packed", **inputs))
    live.close(forward(params, given | extra), out, 1e-4)
