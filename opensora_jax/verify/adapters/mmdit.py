"""MMDiT of Open-Sora 2.0, on packed tokens as recorded."""

import jax
import numpy as np

from opensora_jax.nn import taps
from opensora_jax.verify.case import Adapter, Case


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "mmdit")
    given = case.tensors(run)

    @jax.jit
    def forward(params, **inputs):
        with taps.record() as seen:
            out = net(params, method="packed", **inputs)
        return out, dict(seen)

    names = ("img", "img_ids", "txt", "txt_ids", "y_vec", "cond", "guidance")
    inputs = {name: given[name] for name in names if name in given}
    if not cfg.cond_embed:
        inputs.pop("cond", None)
    if not cfg.guidance_embed:
        inputs.pop("guidance", None)
    out, seen = forward(params, t=given["timesteps"], **inputs)
    return {"out": out} | {f"inter.{name}": value for name, value in intermediates(seen).items()}


def intermediates(seen: dict) -> dict:
    named = {}
    for name, value in seen.items():
        block, _, kind = name.partition("/")
        renamed = {"double_img": "double_block_{}", "double_txt": "double_block_{}_txt", "single": "single_block_{}"}
        named[renamed[kind].format(block) if kind else name] = value
    cos, sin = np.cos(named["rope_angles"]), np.sin(named.pop("rope_angles"))
    named["rope_cos"], named["rope_sin"] = (np.concatenate([table, table], -1) for table in (cos, sin))
    named["rope_pe"] = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)[:, None]
    return named


FAMILIES = {"opensora2_mmdit": Adapter("mmdit", replay)}
