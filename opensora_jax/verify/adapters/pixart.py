"""PixArt: the original on images, and Open-Sora's ports (alpha, multi-scale, Sigma)."""

from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.verify.denoiser import forward, guided, intermediates, text

INTERMEDIATES = {
    "tokens": "tokens_after_patch_and_pos",
    "t_emb": "t_emb",
    "t_block_out": "t_block_out",
    "y_emb": "y_emb",
}


def sizes(given: dict) -> dict:
    """Multi-scale conditioning: [B, 2] of height and width, [B, 1] of their ratio."""
    named = {name.removeprefix("data_info").lstrip("./_"): value for name, value in given.items()}
    hw, ar = named.get("hw", named.get("img_hw")), named.get("ar", named.get("aspect_ratio"))
    return {} if hw is None else {"height": hw[:, 0], "width": hw[:, 1], "ar": ar.reshape(-1)}


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "pixart")
    given = case.tensors(run)
    arrays = {"x": channels_last(given["x"]), "t": given["timestep"], **text(given), **sizes(given)}
    out, seen = forward(net, params, arrays)
    names = INTERMEDIATES | {f"{i}/out": f"block{i}_out" for i in range(cfg.depth)}
    return {"out": channels_first(out), **intermediates(case, run, seen, names)}


def replay_original(case: Case, run: str) -> dict:
    """Images [B, C, H, W]; guidance of the first 3 channels; "dpm" is the prediction without sigma."""
    net, params, cfg = case.load("models", "pixart")
    given, args = case.tensors(run), case.args(run)
    x, named = channels_last(given["x"])[:, None], {"t": given["t"], **text(given), **sizes(given)}
    out, seen = forward(net, params, {"x": x, **named})
    outputs = {"out": channels_first(out[:, 0])}
    if args.get("dpm"):
        outputs["out_dpm"] = channels_first(out[:, 0, ..., : cfg.in_channels])
    if args.get("cfg_scale") is not None:
        if cfg.micro_condition:  # whose guidance forgets the mask in the reference
            named.pop("text_mask", None)
        outputs["out_cfg"] = channels_first(guided(net, params, x, named, args["cfg_scale"], channels=3)[:, 0])
    names = {"patches": "x_embedder", "t_emb": "t_embedder", "t_block_out": "t_block", "y_emb": "y_embedder"}
    names |= {f"{i}/out": f"block_{i}" for i in range(cfg.depth)}
    return outputs | intermediates(case, run, seen, names)


FAMILIES = {
    "pixart_v10": Adapter("pixart", replay),
    "pixartms_v10": Adapter("pixart", replay),
    "pixart_original": Adapter("pixart", replay_original),
}
