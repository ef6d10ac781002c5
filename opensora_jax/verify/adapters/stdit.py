"""STDiT of Open-Sora 1.0 (and 1.1, which added x_mask)."""

from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, intermediates, text

INTERMEDIATES = {
    "tokens": "tokens_after_patch_and_pos",
    "t_emb": "t_emb",
    "t_block_out": "t_block_out",
    "y_emb": "y_emb",
}


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "stdit")
    given = case.tensors(run)
    arrays = {"x": channels_last(given["x"]), "t": given["timestep"], **text(given), "x_mask": given.get("x_mask")}
    out, seen = forward(net, params, arrays)
    names = INTERMEDIATES | {f"{i}/out": f"block{i}_out" for i in range(cfg.depth)}
    return {"out": channels_first(out), **intermediates(case, run, seen, names)}


FAMILIES = {"stdit": Adapter("stdit", replay)}
