"""Every version makes videos from images and videos through the public pipeline: real networks, tiny and random, between
autoencoders and text encoders of one line."""

import json
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.config import part
from opensora_jax.data.video_io import write_video
from opensora_jax.nn.params import Network
from opensora_jax.pipeline import Pipeline, SamplingConfig
from opensora_jax.sampling.given import Codec
from opensora_jax.system import System
from tests.checks import random_params
from tests.sampling.autoencoders import CAUSAL, CHUNKS, FRAMES

TINY = dict(hidden_size=24, depth=1, num_heads=2)
STDIT = TINY | dict(caption_channels=8, model_max_length=4, mlp_ratio=2.0)
NETWORKS = {
    "v1_0": dict(family="stdit", in_channels=3, input_size=[34, 2, 2], **STDIT),
    "v1_1": dict(family="stdit2", in_channels=3, **STDIT),
    "v1_2": dict(family="stdit3", in_channels=3, **STDIT),
    "v1_3": dict(family="stdit3_v13", in_channels=3, kernel_size=[2, 2, -1], use_spatial_rope=True, **STDIT),
    "v2_0": dict(
        family="mmdit", in_channels=12, vec_in_dim=6, context_in_dim=8, axes_dim=[4, 4, 4], depth_single_blocks=1, **TINY
    ),
}  # fmt: skip
NETWORKS["distilled"] = NETWORKS["v2_0"] | dict(guidance_embed=True, cond_embed=False)
SIZE = dict(height=16, width=16, max_length=4, clean_caption=False, guidance_scale=3.0, fps=8.0)
IDDPM = {"name": "iddpm", "preset": "V1_1"}
FLOW = {"name": "rectified_flow", "preset": "V1_2"}
V2_0 = {"objective": FLOW | {"preset": "V2_0"}, "guidance_scale": 7.5, "oscillate_text": True, "oscillate_image": True}
SAMPLING = {
    "v1_0": dict(objective=IDDPM, num_frames=6, steps=2),
    "v1_1": dict(objective=IDDPM, num_frames=6, steps=3, condition_frame_length=2),
    "v1_2": dict(objective=FLOW, num_frames=34, steps=2),
    "v1_3": dict(objective=FLOW | {"preset": "V1_3"}, num_frames=34, steps=2, image_guidance_scale=5.0),
    "v2_0": dict(num_frames=37, steps=50, image_floor=1.0, **V2_0),
}
SAMPLING["distilled"] = SAMPLING["v2_0"] | dict(steps=2)
AUTOENCODERS = {"v1_2": CHUNKS, "v1_3": CHUNKS, "v2_0": CAUSAL, "distilled": CAUSAL}


@dataclass(frozen=True)
class Small(System):
    codec: Codec = FRAMES

    @cached_property
    def networks(self):
        return {"denoiser": Network.of(lambda rngs: self.denoiser.module.build(self.denoiser.config, rngs=rngs))}

    def latent_size(self, frames, height, width):
        return self.codec.latents_of(frames), height // 8, width // 8

    def encode_text(self, params, tokens, mask):
        return jnp.sin(jnp.asarray(tokens)[..., None] * (1.0 + jnp.arange(8)))

    def encode_pooled(self, params, tokens):
        return jnp.cos(jnp.asarray(tokens)[:, :1] * (1.0 + jnp.arange(6)))


class Maker(Pipeline):
    """The autoencoder works on the host."""

    @property
    def codec(self):
        return self.system.codec

    @cached_property
    def _generator(self):
        generator = super()._generator
        generator._codec = lambda params: self.codec
        return generator


def tokenizer(texts, length):
    ids = [[len(text) + 0.1 * i for i in range(min(length, 4))] for text in texts]
    return np.array(ids), np.ones((len(texts), len(ids[0])), np.int32)


@pytest.fixture(scope="module")
def pipe():
    made = {}

    def of(version) -> Pipeline:
        if version not in made:
            codec = AUTOENCODERS.get(version, FRAMES)
            vae = SimpleNamespace(config=SimpleNamespace())
            system = Small(part("models", NETWORKS[version], "model"), vae, codec=codec)
            params = {"denoiser": random_params(system.networks["denoiser"]), "vae": {}} | dict.fromkeys(
                ("text_encoder", "text_encoder_2")
            )
            second = tokenizer if "y_vec" in system.takes else None
            made[version] = Maker(system, params, SamplingConfig(**SIZE | SAMPLING[version]), tokenizer, None, second)
        return made[version]

    return of


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), np.uint8)


def through(codec, frames):
    """Frames [T, H, W, 3] as the autoencoder gives them back."""
    frames = frames[None] if frames.ndim == 3 else frames
    pixels = codec.decode(codec.encode(frames / np.float32(127.5) - 1)[None], len(frames))[0]
    return np.clip((pixels + 1) / 2, 0, 1) * 255


def test_v1_1_keeps_given_frames_nearly(pipe, image):
    """Its sampler lets given frames through the network at the last step, at a hundredth of noise."""
    out = pipe("v1_1")("a cat", image=image, loop=2)
    assert out.frames.shape == (1, 6 + 4, 16, 16, 3) and np.isfinite(out.latents).all()
    np.testing.assert_allclose(out.frames[0, 0], through(FRAMES, image)[0], atol=12)
    assert np.abs(out.frames[0, 1] - through(FRAMES, image)[0]).max() > 40


def test_v1_2_keeps_given_frames_exactly_and_goes_on(pipe, image, tmp_path):
    """A prompt for each clip, an image for each prompt; a sample is the same alone and beside another."""
    path = tmp_path / "second.mp4"
    write_video(path, np.repeat(image[None, ::-1], 20, 0), fps=8)
    own = json.dumps({"reference_path": str(path), "mask_strategy": "0,0,-5,0,5"})
    texts = ["|0|a cat|1|a long dog", f"a bird{own}"]
    pipeline = pipe("v1_2")
    both = pipeline.generate(texts, [1, 2], image=image, loop=2)
    assert both.frames.shape == (2, 34 + 17, 16, 16, 3) and both.latents.shape == (2, 15, 2, 2, 3)
    np.testing.assert_allclose(both.frames[0, 0], through(CHUNKS, image)[0], atol=0.51)
    alone = pipeline.generate(["a cat"], [1], image=image)
    np.testing.assert_array_equal(alone.frames[0], both.frames[0, :34])
    plain = pipeline.generate(["a cat"], [1])
    assert np.abs(plain.latents[0, 1] - alone.latents[0, 1]).max() > 0.05  # other frames see the image


def test_v1_3_is_guided_by_a_video_and_holds_it(pipe, video):
    pipeline = pipe("v1_3")
    out = pipeline("a cat", video=video, loop=2)
    assert out.frames.shape == (1, 51, 16, 16, 3) and np.isfinite(out.latents).all()
    other = pipeline("a cat", video=video[::-1], loop=2)
    assert np.abs(out.latents - other.latents).max() > 0.05
    told = pipeline("a cat", video=video, loop=2, image_guidance_scale=2.0)
    assert np.abs(out.latents - told.latents).max() > 0.05


def counted(pipeline, monkeypatch):
    """Steps that count the network's forwards and leave the noise as it is."""
    forwards = []

    def step(params, state, branches, *rest, **settings):
        forwards.append(len(branches))
        return state

    monkeypatch.setitem(pipeline._generator.__dict__, "_step", step)
    return forwards


def test_v2_0_takes_80_forwards_for_text_and_110_for_images(pipe, image, video, monkeypatch):
    pipeline = pipe("v2_0")
    forwards = counted(pipeline, monkeypatch)
    pipeline("a cat")
    assert (len(forwards), sum(forwards)) == (50, 80)
    forwards.clear()
    out = pipeline("a cat", references=[image, image[::-1]])
    assert (len(forwards), sum(forwards)) == (50, 110)
    np.testing.assert_allclose(out.frames[0, 0], through(CAUSAL, image)[0], atol=0.51)
    np.testing.assert_allclose(out.frames[0, -1], through(CAUSAL, image[::-1])[0], atol=0.51)
    told = []
    out = pipeline("a cat", video=video, loop=3, steps=2, callback=lambda *at: told.append(at))
    assert out.frames.shape[1] == 37 + 2 * 4 and told[-1] == (6, 6)


def test_v2_0_sees_what_it_is_given(pipe, image):
    pipeline = pipe("v2_0")
    out = pipeline("a cat", image=image, steps=2)
    np.testing.assert_allclose(out.frames[0, 0], through(CAUSAL, image)[0], atol=0.51)
    other = pipeline("a cat", image=image[::-1], steps=2)
    assert np.abs(out.latents[:, 1:] - other.latents[:, 1:]).max() > 1e-3


def test_prompts_are_told_scores_and_change_from_clip_to_clip(pipe):
    generator = pipe("v1_2")._generator
    told = lambda prompt, **settings: generator._texts(prompt, SamplingConfig(clean_caption=False, **settings))
    assert told("|0|a cat|2|a dog", loop=3) == ["a cat", "a cat", "a dog"]
    assert told("a cat", scores={"aes": 6.5}) == ["a cat aesthetic score: 6.5."]
    assert told("a cat", scores={"version": "2.0", "fps": 24, "flow": 4}) == ["a cat. 24 FPS. 4 motion score."]
    with pytest.raises(UserError, match="speaks of clip 2, but loop=2"):
        told("|0|a cat|2|a dog", loop=2)


def test_a_distilled_network_is_called_once_a_step(pipe, monkeypatch):
    pipeline = pipe("distilled")
    forwards = counted(pipeline, monkeypatch)
    pipeline("a cat")
    assert forwards == [1, 1]
    with pytest.raises(UserError, match="takes no negative prompt"):
        pipeline("a cat", negative_prompt="a dog")


@pytest.mark.parametrize(
    ("version", "settings", "message"),
    [
        ("v1_2", {"image": "none.png"}, "there is no reference file none.png"),
        ("v1_2", {"image": np.zeros((4, 4), np.uint8)}, "a reference must be uint8"),
        ("v1_2", {"condition": "i2v_head"}, "needs an image or a video"),
        ("v1_2", {"condition": "i2v_middle", "image": 1}, "'i2v_middle' is not one of i2v_head"),
        ("v1_2", {"mask_strategy": "0"}, "asks for reference 0; 0 are given"),
        ("v1_2", {"mask_strategy": "0", "condition": "i2v_head", "image": 1}, "exclude each other"),
        ("v1_2", {"image": 1, "num_frames": 1}, "num_frames must be larger than 1"),
        ("v1_2", {"loop": 2, "condition_frame_length": 3}, "must be a multiple of 5"),
        ("v1_2", {"loop": 2, "condition_frame_length": 10}, "leaves nothing to make"),
        ("v1_2", {"loop": 0}, "width and loop must be at least 1"),
        ("v1_2", {"image_guidance_scale": 3.0}, "image_guidance_scale means nothing to this pipeline's network"),
        ("v1_1", {"image": 1, "solver": "dpm_solver"}, "this solver keeps no frames"),
        ("v1_2", {"prompts": ['a{"reference": 1}']}, "unknown key 'reference'"),
        ("v2_0", {"mask_strategy": "0", "image": 1}, r"\(mmdit\) takes no mask strategy"),
        ("v2_0", {"condition_frame_length": 4}, "condition_frame_length means nothing"),
        ("v2_0", {"height": 24}, "multiples of 16"),
        ("v2_0", {"image": 1, "num_frames": 17, "loop": 2, "steps": 1}, "needs 9 latent frames"),
        ("distilled", {"image": 1}, r"\(mmdit\) takes no images, videos or loops"),
    ],
)  # fmt: skip
def test_wrong_uses_are_one_sentence(pipe, image, monkeypatch, version, settings, message):
    pipeline = pipe(version)
    counted(pipeline, monkeypatch)
    settings = {
        name: image if name == "image" and isinstance(value, int) else value for name, value in settings.items()
    }
    prompts = settings.pop("prompts", ["a cat"])
    with pytest.raises(UserError, match=message) as caught:
        pipeline(prompts, **settings)
    assert "\n" not in str(caught.value)
