"""CLIP's image model as transformers runs it (pixel_values are normalised already)."""

import jax
import numpy as np

from opensora_jax.models.clip_vision import MEAN, STD
from opensora_jax.verify.case import Adapter, Case, channels_last


def replay(case: Case, run: str) -> dict:
    net, params, _ = case.load("models", "clip_vision")
    pixels = channels_last(case.tensors(run)["pixel_values"]) * np.float32(STD) + np.float32(MEAN)
    return {"image_embeds": jax.jit(lambda x: net(params, x))(pixels)}


FAMILIES = {"clip_vision": Adapter("clip_vision", replay)}
