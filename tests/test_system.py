"""How captions become features: which of their tokens the encoder may look at."""

from functools import cached_property

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.config import part
from opensora_jax.system import System

T5 = part("text", dict(family="t5", d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9), "x")
STDIT3 = part("models", dict(family="stdit3", hidden_size=24, depth=1, num_heads=2, caption_channels=8), "x")
MMDIT = part("models", dict(family="mmdit", hidden_size=24, num_heads=2, axes_dim=[4, 4, 4], context_in_dim=8), "x")


class Told(System):
    @cached_property
    def networks(self):
        return {"text_encoder": lambda params, tokens, mask: jnp.ones(1) if mask is None else jnp.zeros(1)}


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (dict(denoiser=STDIT3), False),
        (dict(denoiser=MMDIT, text_encoder_2=T5), True),
        (dict(), False),
        (dict(text_encoder_2=T5), True),
    ],
    ids=["1.x", "2.0", "encoding for 1.x", "encoding for 2.0"],
)
def test_padding_is_read_by_2_0_alone(parts, whole):
    out = Told(text_encoder=T5, **parts).encode_text(None, np.ones((1, 4)), np.array([[1, 1, 0, 0]]))
    assert bool(out[0]) == whole
