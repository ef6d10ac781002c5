"""STDiT3 of Open-Sora 1.2."""

from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, intermediates, projected_text, text

INTERMEDIATES = {
    "tokens": "tokens_after_patch_and_pos",
    "t_emb": "t_emb",
    "fps_emb": "fps_emb",
    "t_block_out": "t_block_out",
    "y_emb": "y_emb",
}
CONDITIONING = ("x_mask", "fps", "height", "width")


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "stdit3")
    given = case.tensors(run)
    captions = projected_text(given) if cfg.skip_y_embedder else text(given)
    arrays = {"x": channels_last(given["x"]), "t": given["timestep"], **captions}
    out, seen = forward(net, params, arrays | {name: given.get(name) for name in CONDITIONING})
    kinds = {f"{i}/{kind}_out": f"{kind}{i}_out" for i in range(cfg.depth) for kind in ("spatial", "temporal")}
    return {"out": channels_first(out), **intermediates(case, run, seen, INTERMEDIATES | kinds)}


FAMILIES = {"stdit3_v12": Adapter("stdit3", replay)}
