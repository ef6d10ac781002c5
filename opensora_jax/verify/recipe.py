"""Weights that a case describes instead of carrying: each tensor from one random stream, in the order that it lists."""

import numpy as np


def weights(order: list, seed: int) -> dict[str, np.ndarray]:
    """order: (name, shape) of the reference's state dict, constants and counters included."""
    stream = np.random.RandomState(seed)
    made = {}
    for name, shape in order:
        if name.startswith("scaling_layer.") or name.endswith("num_batches_tracked"):
            continue
        z = stream.standard_normal(int(np.prod(shape))).reshape(shape)
        made[name] = _scaled(name, shape, z).astype(np.float32)
    return made


def _scaled(name: str, shape, z):
    if name.endswith("running_var"):
        return 0.5 + np.abs(z)
    if name.endswith("running_mean"):
        return 0.2 * z
    if name.startswith("lin") and len(shape) == 4 and shape[0] == 1:
        return np.abs(z) / shape[1]
    if len(shape) >= 2:
        return z * np.sqrt(2 / np.prod(shape[1:]))
    return 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
