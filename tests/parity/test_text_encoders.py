"""Live: our text encoders against transformers' T5 and CLIP."""

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.parity import live

pytestmark = pytest.mark.parity

IDS = np.random.default_rng(0).integers(3, 60, (2, 9)).astype(np.int32)
MASK = np.array([[1] * 9, [1] * 5 + [0] * 4], np.int32)


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_t5(kind):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj=kind,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    model = T5EncoderModel(config)
    net, params = live.ours(model, "text", "t5", config.to_dict())
    with torch.no_grad():
        out = model(torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).last_hidden_state
    live.close(jax.jit(net.__call__)(params, IDS, MASK), out)


@pytest.mark.parametrize("end", [2, 63], ids=["first published id", "end token"])
def test_clip(end):
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=9, projection_dim=16, eos_token_id=end, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    net, params = live.ours(model, "text", "clip", config.to_dict())
    ids = IDS.copy()
    ids[0, 8], ids[1, 4:] = 63, 63
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long())
    ours = jax.jit(net.__call__)(params, ids)
    live.close(ours.tokens, theirs.last_hidden_state)
    live.close(ours.projected, theirs.text_embeds)
