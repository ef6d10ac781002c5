"""Metrics: recorded values of the reference's evaluation, and cases with known answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.metrics import clip_score, fvd, lpips, psnr, ssim
from tests.checks import check_case


@pytest.mark.parametrize("name", ["psnr_ssim", "fvd_preprocess", "frechet", "clipscore"])
def test_recorded_cases(goldens, name):
    check_case(goldens, f"osp_eval_{name}")


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).uniform(0.2, 0.8, (2, 3, 16, 20, 3)).astype("f4")


def test_psnr_of_a_known_error_and_of_none(video):
    np.testing.assert_allclose(psnr.psnr(video, video + 0.1), 20, rtol=1e-4)
    np.testing.assert_array_equal(psnr.psnr(video, video), 100)


def test_ssim_bounds_and_size(video):
    np.testing.assert_allclose(ssim.ssim(video, video), 1)
    noisy = np.clip(video + np.random.default_rng(1).normal(0, 0.2, video.shape), 0, 1)
    assert ssim.ssim(video, noisy).shape == (2, 3) and (ssim.ssim(video, noisy) < 0.95).all()
    np.testing.assert_allclose(ssim.ssim(video, noisy), ssim.ssim(noisy, video))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim.ssim(video[:, :, :8], video[:, :, :8])


def test_lpips_goes_frame_by_frame_in_batches(video):
    seen = []

    def distance(x, y):
        seen.append(x.shape)
        assert x.min() >= -1 and y.max() <= 1
        return jnp.abs(x - y).mean(-1)  # a map

    other = video.copy()
    other[1, 2] += 0.1
    got = lpips.lpips(distance, video, other, batch=4)
    assert seen == [(4, 16, 20, 3)] * 2
    np.testing.assert_allclose(got, np.where(np.arange(6).reshape(2, 3) == 5, 0.2, 0), atol=1e-6)
    grey = lpips.lpips(distance, video[..., :1], other[..., :1], batch=4)
    np.testing.assert_allclose(grey, got, atol=1e-6)


def test_frechet_distance_of_gaussians_with_known_moments():
    rng = np.random.default_rng(2)
    base = rng.normal(size=(400, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    other = base * [1, 2, 3] + [1, 0, 0]
    np.testing.assert_allclose(fvd.frechet_distance(base, other), 1 + 0 + 1 + 4, rtol=1e-6)
    np.testing.assert_allclose(fvd.frechet_distance(base, base), 0, atol=1e-9)
    few = rng.normal(size=(3, 8))  # singular covariances
    np.testing.assert_allclose(fvd.frechet_distance(few, few), 0, atol=1e-6)
    np.testing.assert_allclose(fvd.frechet_distance(few[:1], few[1:2]), np.square(few[0] - few[1]).sum())


def test_fvd_by_length(monkeypatch):
    monkeypatch.setattr(fvd, "preprocess", lambda videos, convention: np.asarray(videos))
    rng = np.random.default_rng(3)
    real, generated = rng.uniform(size=(2, 6, 12, 2, 2, 3))
    network = lambda clips: np.asarray(clips).sum((2, 3))[:, -1]  # of the last frame
    found = fvd.fvd(network, real, generated, lengths=range(10, 13), batch=4)
    expected = fvd.frechet_distance(real[:, 10].sum((1, 2)), generated[:, 10].sum((1, 2)))
    assert list(found) == [10, 11, 12]
    np.testing.assert_allclose(found[11], expected, rtol=1e-5)
    assert list(fvd.fvd(network, real, generated)) == [12]
    with pytest.raises(ValueError, match="10 to 12 frames"):
        fvd.fvd(network, real, generated, lengths=[9])


def test_conventions_differ_by_rounding():
    videos = np.full((1, 1, 8, 12, 3), 0.999, "f4")
    plain, rounded = (fvd.preprocess(videos, name, 8) for name in fvd.CONVENTIONS)
    np.testing.assert_allclose(plain, 0.998, rtol=1e-5)
    np.testing.assert_allclose(rounded, 2 * 254 / 255 - 1, rtol=1e-5)
    assert plain.shape == (1, 1, 8, 8, 3)
    with pytest.raises(ValueError, match="videogpt"):
        fvd.preprocess(videos, "fid")


def test_clip_score_is_a_scaled_cosine():
    got = clip_score.clip_score(np.array([[3.0, 0], [1, 1]]), np.array([[5.0, 0], [0, 2]]))
    np.testing.assert_allclose(got, [100, 100 / np.sqrt(2)], rtol=1e-6)
