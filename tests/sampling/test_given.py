"""What each version's network and solver are given, and how clips become a long video; with autoencoders of one line."""

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.sampling import given
from opensora_jax.sampling.given import Channels, Codec, Embedders, Masks, Script, kind_of, way_of
from tests.sampling.autoencoders import CAUSAL, CHUNKS, FRAMES

NOISE = np.full((2, 10, 1, 1, 3), 9.0, np.float32)


def clip(frames, start=0.0):
    """[T, 8, 8, 3]: frame t has the value start + t / 100."""
    return np.broadcast_to((start + np.arange(frames) / 100).reshape(-1, 1, 1, 1), (frames, 8, 8, 3)).astype(np.float32)


def values(latents):
    return np.asarray(latents, np.float64)[..., 0, 0, 0].round(4).tolist()


def test_autoencoders_know_their_frames():
    codec = lambda spec: Codec(spec.encode, spec.decode, spec.latents_of, spec.frames_of, spec.chunk)
    assert (codec(CAUSAL).time, codec(CAUSAL).causal, codec(FRAMES).time, codec(FRAMES).causal) == (4, True, 1, False)
    assert len(codec(CAUSAL).whole(clip(12))) == 9 and len(codec(CHUNKS).whole(clip(40))) == 34
    assert len(codec(CHUNKS).whole(clip(7))) == 1


def test_references_suggest_a_condition():
    still, video = clip(1), clip(9)
    assert [kind_of("", parts) for parts in ([], [still], [still, still], [video])] == [
        "", "i2v_head", "i2v_loop", "v2v_head",
    ]  # fmt: skip
    assert kind_of("i2v_tail", [video]) == "i2v_tail" and kind_of("t2v", []) == ""
    with pytest.raises(UserError, match="3 references are given: say by condition"):
        kind_of("", [still] * 3)
    with pytest.raises(UserError, match="i2v_tail needs an image or a video"):
        kind_of("i2v_tail", [])


def test_networks_are_told_in_their_own_way():
    assert way_of(frozenset({"x_mask", "cond", "cond_mask"}), masked=False) is Embedders
    assert way_of(frozenset({"x_mask", "cond", "cond_mask"}), masked=True) is Masks
    assert way_of(frozenset({"cond"}), masked=False) is Channels and way_of(frozenset({"cond"}), masked=True) is None
    assert way_of(frozenset({"x_mask"}), masked=False) is Masks and way_of(frozenset({"y"}), masked=False) is None


def test_masks_keep_frames_and_carry_the_end_on():
    """1.1: two samples, one begins with its image, the other is free; the second clip begins with the end of the first."""
    script = Script("i2v_head", frames=10, loops=2, carry=4, edit=0.25)
    film = Masks(FRAMES, script, [[clip(1, 0.5)], []])
    start = film.start(0, NOISE)
    assert start.mask[:, :2].tolist() == [[0, 1], [1, 1]] and values(start.latents)[0][:2] == [0.5, 9.0]
    first = np.stack([clip(10), clip(10, 0.3)])[:, :, :1, :1]
    film.add(first)
    start = film.start(1, NOISE)
    assert start.mask[0].tolist() == [0.25] * 4 + [1] * 6
    np.testing.assert_allclose(values(start.latents)[1][:5], [0.36, 0.37, 0.38, 0.39, 9.0], rtol=1e-5)
    film.add(first + 1)
    assert film.pixels().shape == (2, 16, 8, 8, 3) and film.latents().shape[1] == 16
    np.testing.assert_allclose(values(film.pixels())[0][9:11], [0.09, 1.04], rtol=1e-5)
    assert Masks(FRAMES, Script(), [[]]).start(0, NOISE[:1]).mask is None


def test_masks_align_to_chunks():
    """1.2: two images are the first latent frame and that with which the last chunk begins; clips overlap by 17 frames."""
    script = Script(strategies=("0;0,1,0,-1,1",), frames=34, loops=2, carry=5)
    film = Masks(CHUNKS, script, [[clip(1, 0.5), clip(1, 0.7)]])
    start = film.start(0, NOISE[:1])
    assert np.flatnonzero(start.mask[0] == 0).tolist() == [0, 5] and values(start.latents)[0][5] == 0.7
    for _ in range(2):
        film.add(np.zeros((1, 10, 1, 1, 3), np.float32))
    assert film.pixels().shape[1] == 34 + 17 and film.latents().shape[1] == 15


@pytest.mark.parametrize(
    ("kind", "kept"), [("i2v_tail", [9]), ("i2v_loop", [0, 9]), ("v2v_head", [0, 1, 2]), ("v2v_tail", [7, 8, 9])]
)
def test_conditions_in_the_language_of_masks(kind, kept):
    start = Masks(FRAMES, Script(kind, frames=10, carry=3), [[clip(10)]]).start(0, NOISE[:1])
    assert np.flatnonzero(start.mask[0] == 0).tolist() == kept
    np.testing.assert_allclose([values(start.latents)[0][t] for t in kept], np.array(kept) / 100, rtol=1e-5)


def test_embedders_give_latents_beside_the_noise():
    """1.3: the last image waits for the last clip; latents of all clips are decoded at once."""
    script = Script("i2v_tail", frames=34, loops=2, carry=5, hold=True)
    film = Embedders(CHUNKS, script, [[clip(1, 0.5)]] * 2)
    assert film.start(0, NOISE).arguments == {} and film.start(0, NOISE).latents is NOISE
    film.add(np.arange(20.0, dtype=np.float32).reshape(2, 10, 1, 1, 1) * np.ones(3, np.float32))
    start = film.start(1, NOISE)
    assert start.frames == (0, 1, 2, 3, 4, 9)
    assert values(start.arguments["cond"])[1] == [15, 16, 17, 18, 19, 0, 0, 0, 0, 0.5]
    assert values(start.arguments["cond_mask"])[0] == [1] * 5 + [0] * 4 + [1]
    assert start.arguments["cond_mask"].shape == NOISE.shape and not start.without_image["cond"].any()
    np.testing.assert_array_equal(start.held[0], start.arguments["cond"])
    film.add(np.zeros_like(NOISE))
    assert film.latents().shape[1] == 15 and film.pixels().shape[1] == 51
    with pytest.raises(UserError, match="with and without references"):
        Embedders(CHUNKS, script, [[clip(1)], []])


def test_channels_give_a_mask_and_latents():
    """2.0: stills are encoded alone, and take their places again; what follows begins with 33 frames of what was made."""
    script = Script("i2v_head", frames=37, loops=2)
    film = Channels(CAUSAL, script, [[clip(9, 0.5)], None])
    start = film.start(0, NOISE)
    cond = start.arguments["cond"]
    assert cond.shape == (2, 10, 1, 1, 4) and values(cond)[0] == [1] + [0] * 9 and not cond[1].any()
    assert cond[0, 0, 0, 0, 1] == 0.5 and not start.without_image["cond"].any()
    made = np.broadcast_to(np.arange(10.0).reshape(1, -1, 1, 1, 1), NOISE.shape).astype(np.float32)
    film.add(made)
    assert values(film.made[0]) == [[0.5, *range(1, 10)], [*range(10)]]
    cond = film.start(1, NOISE).arguments["cond"]
    assert values(cond)[1] == [1] * 9 + [0] and cond[1, :9, 0, 0, 1].tolist() == [1, *range(2, 10)]
    film.add(made)
    assert film.pixels().shape == (2, 37 + 4, 8, 8, 3) and film.latents().shape[1] == 11
    plain = Channels(CAUSAL, Script(frames=37), [[]])
    assert plain.start(0, NOISE[:1]).arguments == {}
    plain.add(made[:1])
    assert plain.pixels().shape[1] == 37


def test_padding_of_stills_is_cut_off_again():
    four = Codec(lambda v: v[:: 4 if len(v) > 1 else 1, :1, :1], FRAMES.decode, lambda n: -(-n // 4), lambda n: 4 * n)
    assert not four.causal
    film = Channels(
        Codec(four.encode, lambda z, n: np.repeat(z, 4, 1), four.latents_of, four.frames_of),
        Script("i2v_loop", frames=40),
        [[clip(1), clip(1, 0.5)]],
    )
    film.start(0, NOISE[:1])
    film.add(NOISE[:1])
    assert (
        film.pixels().shape[1] == 34 and values(film.pixels())[0][:2] == [0, 9] and film.pixels()[0, -1, 0, 0, 0] == 0.5
    )


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="condition 'v2v_head_easy' is not one of i2v_head"):
        Masks(FRAMES, Script("v2v_head_easy"), [[clip(1)]])
    with pytest.raises(UserError, match="unknown condition 'i2v_middle'; choose one of t2v"):
        Channels(CAUSAL, Script("i2v_middle"), [[clip(1)]])
    with pytest.raises(UserError, match="i2v_loop gives: use loop=1"):
        Channels(CAUSAL, Script("i2v_loop", loops=2), [[clip(1)]])
    with pytest.raises(UserError, match="needs 9 latent frames, the reference has 3"):
        Channels(CAUSAL, Script("v2v_head"), [[clip(9)]]).start(0, NOISE[:1])
    with pytest.raises(UserError, match="asks for reference 1; 1 are given"):
        Masks(FRAMES, Script(strategies=("0,1",)), [[clip(1)]]).start(0, NOISE[:1])
    assert given.way_of(frozenset(), masked=True) is None
