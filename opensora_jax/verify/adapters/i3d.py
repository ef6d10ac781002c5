"""I3D, the network of FVD; its cases describe their weights by recipe."""

import jax

from opensora_jax.verify import recipe
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last, load_network


def replay(case: Case, run: str) -> dict:
    weights = case.weights or recipe.weights(case.data["weights_order"], case.data["seed"])
    net, params, _ = load_network("models", "i3d", weights, case.config)
    x = channels_last(case.tensors(run)["x"])
    logits, features = jax.jit(lambda x: (net(params, x), net(params, x, method="features")))(x)
    return {"logits": logits, "features": channels_first(features)}


FAMILIES = {"osp_i3d": Adapter("i3d", replay)}
