"""Latte: Vchitect's (classes, nothing, text) and Open-Sora 1.0's port; LatteT2V of Vchitect is latte_t2v's network."""

import numpy as np

from opensora_jax.verify.adapters import latte_t2v
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, guided, intermediates, text


def seen_by_block(seen: dict, name: str) -> dict:
    """Taps under the recording's block numbers; temporal blocks were recorded as [B S, T, C]."""
    blocks = {}
    for key, value in seen.items():
        index, _, kind = key.rpartition("/")
        if kind == "spatial_out":
            blocks[name.format(2 * int(index))] = value
        elif kind == "temporal_out":
            blocks[name.format(2 * int(index) + 1)] = value.swapaxes(1, 2)
        else:
            blocks[key] = value
    return blocks


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "latte")
    given = case.tensors(run)
    y = given["y"] if cfg.num_classes else text({"y": given["y"]})["y"]
    out, seen = forward(net, params, {"x": channels_last(given["x"]), "t": given["timestep"], "y": y})
    seen = seen_by_block(seen, "block{}_out")
    names = {"tokens": "tokens_after_patch_and_pos"} | {key: key for key in seen if key != "tokens"}
    return {"out": channels_first(out), **intermediates(case, run, seen, names)}


def replay_vchitect(case: Case, run: str) -> dict:
    """x [B, T, C, H, W]; guidance with the first 4 channels."""
    if "num_attention_heads" in case.config:
        return latte_t2v.replay(case, run)
    net, params, cfg = case.load("models", "latte")
    given, args = case.tensors(run), case.args(run)
    last = lambda x: np.moveaxis(np.asarray(x), 2, -1)
    first = lambda x: np.moveaxis(np.asarray(x), -1, 2)
    named = {"t": given["t"]}
    for name in ("y", "text_embedding"):
        if given.get(name) is not None and cfg.condition != "none":
            named["y"] = given[name]
    out, seen = forward(net, params, {"x": last(given["x"]), **named})
    outputs = {"out": first(out)}
    if args.get("cfg_scale") is not None:
        outputs["out_cfg"] = first(guided(net, params, last(given["x"]), named, args["cfg_scale"], channels=4))
    seen = seen_by_block(seen, "block_{}")
    names = {"patches": "x_embedder", "t_emb": "t_embedder", "y_emb": "y_embedder"}
    return outputs | intermediates(case, run, seen, names | {key: key for key in seen if key.startswith("block_")})


FAMILIES = {"latte_v10": Adapter("latte", replay), "latte_vchitect": Adapter("latte", replay_vchitect)}
