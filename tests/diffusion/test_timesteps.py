"""Timestep shifts against the recorded tables and against float64 formulas written out here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion.timesteps import (
    PixelShift,
    TimeSampling,
    TokenShift,
    euler_schedule,
    sample_time,
    shift_time,
)

SIZES = {
    "height": np.array([720.0, 240.0], np.float32),
    "width": np.array([1280.0, 426.0], np.float32),
    "num_frames": np.array([102.0, 51.0], np.float32),
}


@pytest.mark.parametrize("version", ["v12", "v13"])
def test_recorded_transform(goldens, version):
    folder = goldens / f"{version}_rflow_timestep_transform_a"
    if not folder.is_dir():
        pytest.skip("recorded cases are not here")
    t = load_file(folder / "inputs.safetensors")["t"]
    expected = load_file(folder / "outputs.safetensors")
    for row in json.loads((folder / "case.json").read_text())["data"]["rows"]:
        style = {"frames": "chunks"} if version == "v12" else {"frames": "quarter", "scale_images": False}
        if "scale_temporal" in row["kwargs"]:
            style["temporal"] = row["kwargs"]["scale_temporal"]
        shift = PixelShift(**style, scale=row["kwargs"].get("scale", 1.0))
        sizes = {k: np.array([row[k]], np.float32) for k in ("height", "width", "num_frames")}
        got = shift_time(t / np.float32(1000), shift.ratio(sizes)) * 1000
        np.testing.assert_allclose(got, expected[f"{row['index']}/t_new"], rtol=1e-5, atol=1e-4)


def test_pixel_shift_is_the_formula_on_host_and_device():
    expected = np.sqrt(720 * 1280 / 512**2) * np.sqrt(102 // 17 * 5), np.sqrt(240 * 426 / 512**2) * np.sqrt(15)
    assert isinstance(PixelShift().ratio(SIZES), np.ndarray)
    np.testing.assert_allclose(PixelShift().ratio(SIZES), expected, rtol=1e-6)
    np.testing.assert_allclose(PixelShift().ratio(jax.tree.map(jnp.asarray, SIZES)), expected, rtol=1e-6)
    quarter = PixelShift("quarter", scale=2.0, scale_images=False)
    np.testing.assert_allclose(quarter.ratio(SIZES)[0], 2 * np.sqrt(720 * 1280 / 512**2) * np.sqrt(101 // 4), rtol=1e-6)
    image = SIZES | {"num_frames": np.ones(2, np.float32)}
    np.testing.assert_allclose(quarter.ratio(image)[0], np.sqrt(720 * 1280 / 512**2), rtol=1e-6)
    np.testing.assert_allclose(PixelShift(scale=2.0).ratio(image)[0], 2 * np.sqrt(720 * 1280 / 512**2), rtol=1e-6)
    short = SIZES | {"num_frames": np.array([16.0, 9.0])}
    np.testing.assert_allclose(PixelShift().ratio(short)[0], 2 * np.sqrt(720 * 1280 / 512**2), rtol=1e-6)
    assert not PixelShift("full_chunks").ratio(short).any()


def test_token_shift_extrapolates_and_gives_way_to_alpha():
    shape = (1, 33, 36, 64, 16)
    np.testing.assert_allclose(TokenShift().ratio({}, shape), (1 + 2 * (576 - 256) / 3840) * np.sqrt(33))
    assert TokenShift(tokens_per_patch=1).ratio({}, (1, 1, 4, 4, 16)) < 1
    assert TokenShift(alpha=3.0).ratio({}, shape) == 3.0


def test_draws_follow_their_method():
    key, shape = jax.random.key(0), (4096, 1, 1, 1, 1)
    uniform = sample_time(key, shape, TimeSampling("uniform"), {})
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1000 and abs(float(uniform.mean()) - 500) < 15
    normal = sample_time(key, shape, TimeSampling("logit-normal", loc=1.0), {})
    assert abs(float(jnp.median(normal)) - 1000 / (1 + np.exp(-1))) < 20
    whole = sample_time(key, shape, TimeSampling("discrete"), {})
    np.testing.assert_allclose(whole, jnp.round(whole), atol=1e-3)
    given = sample_time(None, (2,), TimeSampling("logit-normal"), {}, draw=jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(given, [500, 1000 / (1 + np.exp(-2.0))], rtol=1e-6)


def test_high_times_of_videos_are_redrawn_evenly():
    cfg = TimeSampling("uniform", shift=PixelShift("quarter"), uniform_over=0.9)
    draw, redraw = jnp.array([0.99, 0.01]), jnp.array([0.5, 0.5])
    sizes = jax.tree.map(jnp.asarray, SIZES)
    t = sample_time(None, (2,), cfg, sizes, draw=draw, redraw=redraw)
    np.testing.assert_allclose(t[0], 950, rtol=1e-6)
    assert t[1] < 900
    image = sample_time(None, (2,), cfg, sizes | {"num_frames": jnp.ones(2)}, draw=draw, redraw=redraw)
    assert image[0] > 990


def test_schedule_ends_in_data_and_rounds_when_discrete():
    table = euler_schedule(3, 1000, 2, discrete=True)
    np.testing.assert_array_equal(table[:, 0], [1000, 667, 333, 0])
    shifted = euler_schedule(30, 1000, 2, shift=PixelShift(), sizes=SIZES)
    assert shifted.shape == (31, 2) and shifted.dtype == np.float32
    assert (np.diff(shifted, axis=0) < 0).all() and (shifted[1:-1, 0] > shifted[1:-1, 1]).all()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="num_frames"):
        PixelShift().ratio({"height": np.ones(1), "width": np.ones(1)})
    with pytest.raises(UserError, match="chunks"):
        PixelShift("latents")
    with pytest.raises(UserError, match="logit-normal"):
        TimeSampling("normal")
