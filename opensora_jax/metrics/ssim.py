"""Structural similarity (Wang et al. 2004): Gaussian windows of 11 pixels, standard deviation 1.5, only those that lie
inside; the mean over channels. In float64: variances are differences of nearly equal numbers."""

import numpy as np

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(a, b) -> np.ndarray:
    """a, b [B, T, H, W, C] in [0, 1] → [B, T]."""
    a, b = (np.asarray(video, np.float64) for video in (a, b))
    if min(a.shape[2:4]) < WINDOW:
        raise ValueError(f"ssim needs frames of at least {WINDOW} x {WINDOW}, got {a.shape[2]} x {a.shape[3]}")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * (2 * covariance + C2) / (var_a + var_b + C2)).mean((2, 3, 4))


def _blur(x):
    """Gaussian windows along height and width, without borders."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (2, 3):
        size = x.shape[axis] - WINDOW + 1
        x = sum(weight * np.take(x, range(i, i + size), axis) for i, weight in enumerate(weights))
    return x
