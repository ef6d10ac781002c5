"""DiT: Meta's original on images, and Open-Sora 1.0's port."""

import numpy as np

from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, guided, intermediates, text


def replay(case: Case, run: str) -> dict:
    """Open-Sora: y [B] classes or [B, 1, 1, D] text."""
    net, params, cfg = case.load("models", "dit")
    given = case.tensors(run)
    y = given["y"] if cfg.num_classes else text({"y": given["y"]})["y"]
    out, seen = forward(net, params, {"x": channels_last(given["x"]), "t": given["timestep"], "y": y})
    names = {"tokens": "tokens_after_patch_and_pos", "t_emb": "t_emb", "y_emb": "y_emb"}
    names |= {f"{i}/out": f"block{i}_out" for i in range(cfg.depth)}
    return {"out": channels_first(out), **intermediates(case, run, seen, names)}


def replay_original(case: Case, run: str) -> dict:
    """Images [B, C, H, W]; guidance with the first 3 channels only."""
    net, params, cfg = case.load("models", "dit")
    given, args = case.tensors(run), case.args(run)
    x, named = channels_last(given["x"])[:, None], {"t": given["t"], "y": given["y"]}
    out, seen = forward(net, params, {"x": x, **named})
    outputs = {"out": channels_first(out[:, 0])}
    if args.get("cfg_scale") is not None:
        outputs["out_cfg"] = channels_first(guided(net, params, x, named, args["cfg_scale"], channels=3)[:, 0])
    names = {"patches": "x_embedder", "t_emb": "t_embedder"} | {f"{i}/out": f"block_{i}" for i in range(cfg.depth)}
    return outputs | intermediates(case, run, {k: np.asarray(v) for k, v in seen.items()}, names)


FAMILIES = {"dit_v10": Adapter("dit", replay), "dit_original": Adapter("dit", replay_original)}
