"""Peak signal-to-noise ratio, frame by frame, in decibels."""

import numpy as np

CAP = 100.0  # of frames that are (nearly) equal


def psnr(a, b) -> np.ndarray:
    """a, b [B, T, H, W, C] in [0, 1] → [B, T]; over all channels together."""
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean((2, 3, 4))
    return np.where(error < 1e-10, CAP, -10 * np.log10(np.maximum(error, 1e-10)))
