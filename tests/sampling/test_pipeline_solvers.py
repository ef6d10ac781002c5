"""The pipeline samples with every kind of solver, and a sample depends on its own prompt and seed alone."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.pipeline import Pipeline, SamplingConfig


class Toy:
    """A system of which every part fits on a line."""

    denoiser = SimpleNamespace(family="toy", config=SimpleNamespace())
    vae = None
    latent_channels = 4
    learned_null = True
    takes = frozenset({"x", "t", "y"})

    def latent_size(self, frames, height, width):
        return frames, height // 8, width // 8

    def conditioning(self, batch):
        return {"y": batch["text_emb"]}

    def encode_text(self, params, tokens, mask):
        return jnp.asarray(tokens, jnp.float32) * params

    def denoise(self, params, x, t, *, y, drop_text):
        out = jnp.tanh(x * params + jnp.where(drop_text, 0, y.mean(1)).reshape(-1, 1, 1, 1, 1))
        return jnp.concatenate([out, jnp.zeros_like(out)], -1)

    def decode_video(self, params, latents, frames):
        return jnp.repeat(jnp.repeat(latents[..., :3], 8, 2), 8, 3)


def tokenizer(texts, length):
    return np.array([[len(text) / 10] * 3 for text in texts]), np.ones((len(texts), 3), bool)


@pytest.fixture(scope="module")
def pipe():
    sampling = SamplingConfig(steps=4, num_frames=2, height=16, width=16, clean_caption=False)
    params = {"denoiser": jnp.float32(0.5), "text_encoder": jnp.float32(1.0), "vae": jnp.float32(1.0)}
    return Pipeline(Toy(), params, sampling, tokenizer)


IDDPM = {"name": "iddpm", "preset": "V1_0"}


@pytest.mark.parametrize("solver", ["", "EulerAncestralDiscrete"])
def test_neighbours_do_not_matter(pipe, solver):
    settings = {"objective": IDDPM, "solver": solver} if solver else {"objective": IDDPM, "guided_channels": 3}
    both = pipe.generate(["a cat", "a long dog"], [1, 2], **settings)
    alone = pipe.generate(["a long dog"], [2], **settings)
    np.testing.assert_allclose(both.latents[1], alone.latents[0], rtol=1e-4, atol=1e-5)
    assert both.frames.shape == (2, 2, 16, 16, 3) and np.isfinite(both.latents).all()
    other = pipe.generate(["a long dog"], [3], **settings)
    assert np.abs(other.latents - alone.latents).max() > 1e-2


def test_solvers_and_steps_are_settings(pipe):
    told = []
    pipe.generate(["a cat"], [1], objective=IDDPM, solver="PNDM", steps=5, callback=lambda *at: told.append(at))
    assert told[-1] == (14, 14)
    few, many = (pipe.generate(["a cat"], [1], steps=steps).latents for steps in (2, 6))
    assert np.abs(few - many).max() > 1e-4
    with pytest.raises(UserError, match="does not fit"):
        pipe.generate(["a cat"], [1], solver="PNDM")
