"""STDiT2 of Open-Sora 1.1."""

from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, intermediates, text

INTERMEDIATES = {
    "tokens": "tokens_after_patch_and_pos",
    "t_emb": "t_emb",
    "t_block_out": "t_block_out",
    "t_block_temp_out": "t_block_temp_out",
    "y_emb": "y_emb",
}
CONDITIONING = ("x_mask", "height", "width", "ar", "num_frames", "fps")


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "stdit2")
    given = case.tensors(run)
    arrays = {"x": channels_last(given["x"]), "t": given["timestep"], **text(given)}
    out, seen = forward(net, params, arrays | {name: given.get(name) for name in CONDITIONING})
    names = INTERMEDIATES | {f"{i}/out": f"block{i}_out" for i in range(cfg.depth)}
    return {"out": channels_first(out), **intermediates(case, run, seen, names)}


FAMILIES = {"stdit2": Adapter("stdit2", replay)}
