"""Training gives frames as the configuration says: which way fits the network, and what reaches it."""

from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import config
from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.config import part
from opensora_jax.diffusion import rectified_flow
from opensora_jax.diffusion.conditions import GivenFrames, TrainingConditions
from opensora_jax.nn.params import Network
from opensora_jax.system import System
from opensora_jax.trainer import Trainer
from opensora_jax.training.run import RunConfig

TINY = dict(hidden_size=24, depth=1, num_heads=2)
V1_3 = dict(family="stdit3_v13", in_channels=3, caption_channels=8, model_max_length=4, **TINY)
V2_0 = dict(family="mmdit", in_channels=12, vec_in_dim=6, context_in_dim=8, axes_dim=[4, 4, 4], **TINY)
NETWORKS = {"1.2": V1_3 | {"family": "stdit3"}, "1.3": V1_3, "2.0": V2_0, "plan": {"family": "latte_t2v"}}
SEEN: dict = {}  # the arguments of the network's last call


@dataclass(frozen=True)
class Small(System):
    """Latents are means of 8x8 pixels and of four frames behind the first."""

    @cached_property
    def networks(self):
        return {"denoiser": Network.of(lambda rngs: self.denoiser.module.build(self.denoiser.config, rngs=rngs))}

    def frames_of(self, latents):
        return 4 * latents - 3

    def latent_size(self, frames, height, width):
        return (frames - 1) // 4 + 1, height // 8, width // 8

    def encode_video(self, params, video, key=None):
        b, t, h, w, c = video.shape
        video = video.reshape(b, t, h // 8, 8, w // 8, 8, c).mean((3, 5))
        fours = video[:, 1:].reshape(b, t // 4, 4, h // 8, w // 8, c).mean(2)
        return jnp.concatenate([video[:, :1], fours], 1)

    def denoise(self, params, x, t, **arguments):
        SEEN.clear()
        SEEN.update(arguments)
        return jnp.zeros_like(x)


def trainer(version, **changes) -> Trainer:
    cfg = config.build(RunConfig, changes, "config")
    system = Small(part("models", NETWORKS[version], "model"), SimpleNamespace())
    return Trainer(cfg, SimpleNamespace(system=system, trained="denoiser"), None)


def batch(frames):
    video = np.random.default_rng(0).uniform(-1, 1, (2, frames, 16, 16, 3)).astype(np.float32)
    sizes = dict.fromkeys(("fps", "height", "width"), np.full(2, 16.0, np.float32))
    text = {"text_emb": np.zeros((2, 4, 8), np.float32), "y_vec": np.zeros((2, 6), np.float32)}
    text["num_frames"] = np.full(2, frames, np.float32)
    return {"video": jnp.asarray(video), "x_mask": jnp.ones((2, (frames - 1) // 4 + 1), bool)} | text | sizes


def test_each_network_gets_frames_in_its_way():
    assert trainer("1.2", data={"mask_ratios": {"image_head": 1.0}}).given is None
    of_1_3 = trainer("1.3", data={"mask_types": {"i2v_head": 1.0}}, conditions={"drop": {"keep": 1.0}, "weight": 0.5})
    assert of_1_3.given == GivenFrames((("keep", 1.0),), 0.5)
    of_2_0 = trainer("2.0", conditions={"kinds": {"t2v": 1.0, "i2v_head": 7.0}, "skip_stills": True}).given
    assert of_2_0 == TrainingConditions((("t2v", 1.0), ("i2v_head", 7.0)), True, 4, False, True)
    assert trainer("plan").given is None


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        ("plan", {"data": {"mask_ratios": {"random": 0.5}}}, "mean nothing to latte_t2v: it is never given frames"),
        ("2.0", {"data": {"mask_types": {"none": 1.0}}}, "mean nothing to mmdit: give config.conditions.kinds"),
        ("1.3", {"conditions": {"kinds": {"i2v_head": 1.0}}}, "kinds means nothing to stdit3_v13"),
        ("2.0", {"conditions": {"kinds": {"i2v_middle": 1.0}}}, "unknown condition 'i2v_middle'"),
        ("2.0", {"conditions": {"kinds": {"t2v": -1.0}}}, "must not be negative"),
    ],
)
def test_what_does_not_fit_is_one_sentence(version, changes, message):
    run = trainer(version, **changes)
    with pytest.raises(UserError, match=message):
        print(run.given)


def test_conditions_need_pixels():
    run = trainer("2.0", conditions={"kinds": {"i2v_head": 1.0}})
    with pytest.raises(UserError, match="needs pixels"):
        run.needs_frozen(SimpleNamespace(latents=True))
    run = trainer("1.3", data={"mask_types": {"v2v_head_noisy": 1.0}})
    with pytest.raises(UserError, match=r"noisy kinds of .* need pixels"):
        run.needs_frozen(SimpleNamespace(latents=True))


def test_1_3_sees_the_frames_that_the_loader_drew():
    system = trainer("1.3").system
    loss = system.diffusion_loss(rectified_flow, rectified_flow.V1_3, 1.0, GivenFrames((("keep", 1.0),)))
    one = batch(17)
    value, _ = loss({}, one | {"x_mask": one["x_mask"].at[:, 0].set(False)}, jax.random.key(0), {"vae": None})
    latents = system.encode_video(None, one["video"])
    np.testing.assert_allclose(SEEN["cond"][:, 0], latents[:, 0], rtol=1e-5)
    assert not np.any(SEEN["cond"][:, 1:]) and np.asarray(SEEN["mask_index"]).tolist() == [True] + [False] * 4
    assert np.isfinite(value) and "x_mask" not in SEEN and not SEEN["drop_text"].any()
    loss({}, one, jax.random.key(0), {"vae": None})
    assert not SEEN["cond"].any() and SEEN["drop_text"].all()  # nothing given: text is dropped as without conditions


def test_noisy_kinds_of_1_3_give_frames_with_noise():
    system, one, key = trainer("1.3").system, batch(5), jax.random.key(0)

    @jax.jit
    def features(noisy):
        return system.features(one | {"noisy": noisy}, {"vae": None}, key, GivenFrames())

    for noisy in (False, True):
        out = features(jnp.array([noisy] * 2))
        gap = np.abs(out["reference"] - out["latents"]).max()
        assert 0.01 < gap < 0.5 if noisy else gap < 1e-6  # a third of noise at most, means over 64 pixels


def test_2_0_sees_stills_encoded_alone():
    kinds = TrainingConditions((("i2v_loop", 1.0),), skip_stills=True)
    system = trainer("2.0").system
    cfg = replace(rectified_flow.V2_0, dropout=())
    one = batch(17)
    value, _ = system.diffusion_loss(rectified_flow, cfg, 0.0, kinds)({}, one, jax.random.key(0), {"vae": None})
    cond = np.asarray(SEEN["cond"])
    assert cond[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0, 1] and np.isfinite(value)
    still = one["video"][:, -1].reshape(2, 2, 8, 2, 8, 3).mean((2, 4))
    np.testing.assert_allclose(cond[:, -1, ..., 1:], still, rtol=1e-4, atol=1e-6)


def test_distilled_guidance_is_told_as_configured():
    system = Small(part("models", V2_0 | {"guidance_embed": True}, "model"), SimpleNamespace())
    run = Trainer(
        config.build(RunConfig, {"text": {"guidance": 3.5, "dropout": 0.0}, "objective": {"preset": "V2_0"}}, "config"),
        SimpleNamespace(system=system, trained="denoiser"),
        None,
    )
    run.loss_fn()(system.networks["denoiser"].abstract, batch(5), jax.random.key(0), {"vae": None})
    assert SEEN["guidance"].tolist() == [3.5, 3.5]


def test_the_network_of_1_3_takes_a_traced_mask():
    denoiser = part("models", V1_3, "model")
    inputs = denoiser.module.inputs(denoiser.config, LatentShape(2, 4, 4, 4, 4))
    network = denoiser.network()
    call = lambda params, given, mask: network(params, **given, mask_index=mask)
    out = jax.eval_shape(call, network.abstract, inputs, jax.ShapeDtypeStruct((4,), bool))
    assert out.shape == (2, 4, 4, 4, 6)
