"""LPIPS on VGG16; the case has no weight file but a recipe for one."""

import jax
import jax.numpy as jnp

from opensora_jax.nn import taps
from opensora_jax.verify import recipe
from opensora_jax.verify.case import Adapter, Case, channels_last, load_network


def replay(case: Case, run: str) -> dict:
    weights = case.weights or recipe.weights(case.data["weights_order"], case.data["seed"])
    net, params, _ = load_network("models", "lpips", weights, {})
    given = {name: channels_last(value) for name, value in case.tensors(run).items()}

    @jax.jit
    def forward(params, x, y):
        with taps.record() as seen:
            net(params, x, method="features")
        return net(params, x, y), dict(seen)

    distance, seen = forward(params, given["x"], given["y"])
    names = {"slice1": "relu1_2", "slice2": "relu2_2", "slice3": "relu3_3", "slice4": "relu4_3", "slice5": "relu5_3"}
    means = {f"inter.{names[name]}_mean_abs": jnp.abs(value).mean((1, 2)) for name, value in seen.items()}
    return {"lpips": distance.reshape(-1, 1, 1, 1), **means}


FAMILIES = {"osp_lpips": Adapter("lpips", replay)}
