"""Visual conditions: who is given what, encoded from which frames, and how the loss weighs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.common.packing import latent_size, pack, position_ids, unpack
from opensora_jax.diffusion import conditions as C
from opensora_jax.diffusion import rectified_flow as rf


def encode(causal):
    """An autoencoder one can follow: means of four frames (the first alone when causal) and of 2x2 pixels."""

    def run(x):
        b, t, h, w, c = x.shape
        x = x.reshape(b, t, h // 2, 2, w // 2, 2, c).mean((3, 5))
        head = [x[:, :1].mean(1)] if causal else []
        rest = x[:, 1:] if causal else x
        return jnp.stack(head + [rest[:, i : i + 4].mean(1) for i in range(0, rest.shape[1], 4)], 1)

    return run


def test_every_kind_gives_its_frames():
    z = (1, 21, 2, 2, 3)
    clip = np.random.default_rng(0).normal(size=(17, 2, 2, 3)).astype(np.float32)
    for kind, given in {
        "t2v": [],
        "i2v_head": [0],
        "i2v_tail": [20],
        "i2v_loop": [0, 20],
        "v2v_head": range(9),
        "v2v_tail_easy": range(4, 21),
    }.items():
        mask, latents = C.place(z, kind, [[clip]])
        assert np.flatnonzero(mask[0, :, 0, 0, 0]).tolist() == list(given), kind
        assert (np.abs(latents[0]).max((1, 2, 3)) > 0).tolist() == [t in given for t in range(21)]
    np.testing.assert_array_equal(C.place(z, "v2v_tail", [[clip]], causal=False)[1][0, -8:], clip[-8:])
    assert not np.any(C.place(z, "i2v_head", [None])[0]) and not np.any(
        C.place((1, 1, 2, 2, 3), "i2v_head", [[clip]])[0]
    )


def test_mistakes_are_named():
    with pytest.raises(UserError, match="i2v_loop"):
        C.given_frames("i2v_middle")
    with pytest.raises(UserError, match="9 latent frames"):
        C.place((1, 21, 2, 2, 3), "v2v_head", [[np.zeros((5, 2, 2, 3))]])
    with pytest.raises(UserError, match="one be left"):
        C.GivenFrames().apply({"latents": jnp.zeros((1, 2, 1, 1, 4))}, (0, 1), None)


def test_put_back_replaces_the_ends_of_every_sample():
    x, still = jnp.zeros((2, 3, 1, 1, 2)), np.ones((1, 1, 1, 2))
    np.testing.assert_array_equal(
        C.put_back(x, "i2v_loop", [[still, 2 * still], [still, still]])[:, :, 0, 0, 0], [[1, 0, 2], [1, 0, 1]]
    )
    np.testing.assert_array_equal(C.put_back(x, "i2v_tail", [None, [still]])[:, :, 0, 0, 0], [[0, 0, 0], [0, 0, 1]])
    assert C.put_back(x, "v2v_head", [[still], [still]]) is x


def test_stills_are_encoded_alone_and_kinds_mix_within_a_batch():
    video = jnp.asarray(np.random.default_rng(0).normal(size=(3, 13, 4, 4, 3)), jnp.float32)
    cfg = C.TrainingConditions((("t2v", 1.0), ("i2v_tail", 1.0), ("i2v_loop", 1.0), ("v2v_head", 9.0)))
    assert [kind for kind, _ in cfg.usable(4)] == ["t2v", "i2v_tail", "i2v_loop"]
    both = jax.jit(lambda v, k: C.encode_with_conditions(v, encode(True), k, cfg, 4))
    x, cond = both(video, jnp.array([1, 0, 2]))
    np.testing.assert_allclose(x, encode(True)(video), atol=1e-6)
    still = encode(True)
    assert not np.any(cond[1])
    np.testing.assert_array_equal(cond[0, :, 0, 0, 0], [0, 0, 0, 1])
    np.testing.assert_allclose(cond[0, -1, ..., 1:], still(video[:1, -1:])[0, 0], atol=1e-6)
    np.testing.assert_array_equal(cond[2, :, 0, 0, 0], [1, 0, 0, 1])
    np.testing.assert_allclose(cond[2, 0, ..., 1:], still(video[2:, :1])[0, 0], atol=1e-6)
    assert np.abs(cond[2, -1, ..., 1:] - x[2, -1]).max() > 0.1
    image, nothing = C.encode_with_conditions(video[:, :1], encode(True), jnp.zeros(3, int), cfg, 1)
    assert image.shape == (3, 1, 2, 2, 3) and nothing.shape == (3, 1, 2, 2, 4) and not np.any(nothing)


def test_padding_turns_stills_into_latent_frames_of_their_own():
    video = jnp.arange(16.0).reshape(1, 16, 1, 1, 1) * jnp.ones((1, 16, 2, 2, 1))
    cfg = C.TrainingConditions((("i2v_loop", 1.0),), causal=False, pad=True)
    x, cond = C.encode_with_conditions(video, encode(False), jnp.zeros(1, int), cfg, 4)
    order = [0, 0, 0, *range(10), 9, 9, 9]
    np.testing.assert_allclose(x[0, :, 0, 0, 0], np.reshape(order, (4, 4)).mean(1))
    np.testing.assert_allclose(cond[0, :, 0, 0], [[1, 0], [0, 0], [0, 0], [1, 9]])


def test_long_conditions_and_draws_follow_their_weights():
    video = jnp.asarray(np.random.default_rng(0).normal(size=(1, 49, 2, 2, 3)), jnp.float32)
    cfg = C.TrainingConditions((("v2v_tail", 1.0),))
    _, cond = C.encode_with_conditions(video, encode(True), jnp.zeros(1, int), cfg, 13)
    np.testing.assert_allclose(cond[0, -9:, ..., 1:], encode(True)(video[:, -33:])[0], atol=1e-6)
    assert not np.any(cond[0, :4])
    draws = C.TrainingConditions((("t2v", 1.0), ("i2v_head", 3.0))).draw(jax.random.key(0), 4000, 13)
    assert abs(float((draws == 1).mean()) - 0.75) < 0.03


def test_frame_weights_leave_out_lone_stills_only():
    mask = jnp.array([[1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    expected = [[0, 4 / 3, 4 / 3, 4 / 3], [0, 2, 2, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_allclose(C.frame_weights(mask), expected, rtol=1e-6)


@pytest.mark.parametrize("drop, text, frames", [("null", 1, 0), ("cond", 1, 1), ("text", 0, 0), ("keep", 0, 1)])
def test_given_frames_drop_what_their_name_says(drop, text, frames):
    latents = jnp.ones((2, 4, 1, 1, 3))
    batch = C.GivenFrames(weight=0.4).apply({"latents": latents, "reference": 2 * latents}, (0,), None, drop=drop)
    assert batch["drop_text"].tolist() == [bool(text)] * 2 and "reference" not in batch
    np.testing.assert_array_equal(batch["cond"][0, :, 0, 0, 0], [2 * frames, 0, 0, 0])
    np.testing.assert_array_equal(batch["cond_mask"][0, :, 0, 0, 0], [1, 0, 0, 0])
    np.testing.assert_allclose(batch["frame_weights"][0], [0.4, 1.2, 1.2, 1.2], rtol=1e-6)
    named = rf.conditioning(batch, rf.V1_3, jax.random.key(0))
    assert named["mask_index"] == (0,) and named["drop_text"] is batch["drop_text"] and "frame_weights" not in named


def test_given_frames_may_be_a_mask():
    """So that one compiled step serves every condition that the loader draws, and none."""
    latents = jnp.arange(8.0).reshape(2, 4, 1, 1, 1)
    apply = jax.jit(
        lambda frames: C.GivenFrames(weight=0.4).apply({"latents": latents, "drop_text": told}, frames, key)
    )
    told, key = jnp.array([True, False]), jax.random.key(3)
    mask = jnp.array([True, False, False, True])
    traced, plain = apply(mask), C.GivenFrames(weight=0.4).apply({"latents": latents}, (0, 3), key)
    for name in ("cond", "cond_mask", "frame_weights", "drop_text"):
        np.testing.assert_allclose(traced[name], plain[name], rtol=1e-6, err_msg=name)
    nothing = apply(jnp.zeros(4, bool))
    assert not np.any(nothing["cond"]) and nothing["drop_text"].tolist() == [True, False]
    np.testing.assert_array_equal(nothing["frame_weights"], np.ones((2, 4)))


def test_drops_follow_their_weights():
    cfg = C.GivenFrames(drop=(("null", 0.25), ("keep", 0.75)))
    apply = jax.jit(jax.vmap(lambda k: cfg.apply({"latents": jnp.ones((1, 2, 1, 1, 1))}, (0,), k)["drop_text"][0]))
    assert abs(float(apply(jax.random.split(jax.random.key(0), 2000)).mean()) - 0.25) < 0.04


def test_packing_orders_tokens_and_channels():
    x = np.arange(2 * 3 * 4 * 6 * 5).reshape(2, 3, 4, 6, 5)
    tokens = pack(jnp.asarray(x))
    assert tokens.shape == (2, 18, 20)
    token, channel = 1 * 6 + 1 * 3 + 2, 3 * 4 + 1 * 2 + 0  # frame 1, row 1, column 2; channel 3, lower left
    assert tokens[1, token, channel] == x[1, 1, 3, 4, 3]
    np.testing.assert_array_equal(unpack(tokens, (3, 4, 6)), x)
    np.testing.assert_array_equal(position_ids(2, (3, 4, 6))[0, token], [1, 1, 2])
    assert latent_size(129, 192, 336) == (33, 24, 42) and latent_size(
        128, 768, 768, causal=False, pixels_per_token=32, patch=1
    ) == (32, 24, 24)


def test_noise_augmentation_aims_at_the_clean_latents():
    shape = (2, 1, 1, 1, 2)
    batch = {"latents": jnp.full(shape, 3.0), "clean_latents": jnp.ones(shape)}
    cfg = rf.Config(clean_over=500.0)
    seen = []
    model_fn = lambda x, t: seen.append(x) or jnp.zeros_like(x)
    _, metrics = rf.loss(model_fn, batch, None, cfg, noise=jnp.zeros(shape), t=jnp.array([250.0, 750.0]))
    np.testing.assert_allclose(seen[0][:, 0, 0, 0, 0], [0.75 * 3, 0.25 * 1], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_per_sample"], [1, 1])
