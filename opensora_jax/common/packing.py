"""Patches of latents as tokens, the way Open-Sora 2.0 (and Flux) feed them: order t, h, w; channels c, ph, pw.

Works on NumPy and JAX arrays alike.
"""

import numpy as np

from opensora_jax.common.errors import UserError


def pack(x, patch: int = 2):
    """[B, T, H, W, C] -> [B, T·H/p·W/p, C·p·p]"""
    b, t, h, w, c = x.shape
    if h % patch or w % patch:
        raise UserError(f"latents of {h} x {w} do not split into patches of {patch} x {patch}")
    x = x.reshape(b, t, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 2, 4, 6, 3, 5).reshape(b, -1, c * patch * patch)


def unpack(tokens, size: tuple[int, int, int], patch: int = 2):
    """Back to [B, T, H, W, C]; size: latent (T, H, W)."""
    t, h, w = size
    x = tokens.reshape(tokens.shape[0], t, h // patch, w // patch, -1, patch, patch)
    return x.transpose(0, 1, 2, 5, 3, 6, 4).reshape(tokens.shape[0], t, h, w, -1)


def position_ids(batch: int, size: tuple[int, int, int], patch: int = 2) -> np.ndarray:
    """(frame, row, column) of every token, [B, T·H/p·W/p, 3] float32; text tokens sit at zero."""
    t, h, w = size[0], size[1] // patch, size[2] // patch
    grid = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1)
    return np.broadcast_to(grid.reshape(1, -1, 3).astype(np.float32), (batch, t * h * w, 3))


def latent_size(num_frames: int, height: int, width: int, *, causal=True, time=4, pixels_per_token=16, patch=2):
    """Latent (T, H, W) of a clip; sizes that fill no whole token are rounded up (16 pixels a token, DC-AE 32)."""
    frames = 1 if num_frames == 1 else (num_frames - 1) // time + 1 if causal else num_frames // time
    return frames, -(-height // pixels_per_token) * patch, -(-width // pixels_per_token) * patch
