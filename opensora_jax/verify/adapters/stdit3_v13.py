"""STDiT3 of Open-Sora 1.3."""

from opensora_jax.verify.adapters.stdit3 import INTERMEDIATES
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, intermediates, projected_text, text

CONDITIONING = ("x_mask", "fps", "height", "width", "mask_index")


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "stdit3_v13")
    given = case.tensors(run)
    captions = projected_text(given) if cfg.skip_y_embedder else text(given)
    arrays = {"x": channels_last(given["x"]), "t": given["timestep"], **captions}
    arrays |= {name: given.get(name) for name in CONDITIONING}
    arrays |= {name: channels_last(given.get(name)) for name in ("cond", "cond_mask")}
    if given.get("y_null") is not None:
        arrays["y_null"] = text({"y": given["y_null"]})["y"]
    out, seen = forward(net, params, arrays)
    kinds = {f"{i}/{kind}_out": f"{kind}{i}_out" for i in range(cfg.depth) for kind in ("spatial", "temporal")}
    return {"out": channels_first(out), **intermediates(case, run, seen, INTERMEDIATES | kinds)}


FAMILIES = {"stdit3_v13": Adapter("stdit3_v13", replay)}
