"""STDiT3 of Open-Sora 1.2."""

import jax

from opensora_jax.nn import taps
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

INTERMEDIATES = {
    "tokens": "tokens_after_patch_and_pos",
    "t_emb": "t_emb",
    "fps_emb": "fps_emb",
    "t_block_out": "t_block_out",
    "y_emb": "y_emb",
    "0/spatial_out": "spatial0_out",
    "0/temporal_out": "temporal0_out",
}


def replay(case: Case, run: str) -> dict:
    net, params, cfg = case.load("models", "stdit3")
    given = case.tensors(run)

    @jax.jit
    def forward(params, x, t, y, **conditioning):
        with taps.record() as seen:
            out = net(params, x, t, y, **conditioning)
        return out, dict(seen)

    out, seen = forward(
        params,
        channels_last(given["x"]),
        given["timestep"],
        given["y"][:, 0],
        text_mask=given.get("mask"),
        x_mask=given.get("x_mask"),
        fps=given["fps"],
        height=given["height"],
        width=given["width"],
    )
    outputs = {"out": channels_first(out)}
    for tap, name in INTERMEDIATES.items():
        recorded = case.outputs.get(f"{run}/inter.{name}")
        if recorded is not None:
            outputs[f"inter.{name}"] = seen[tap].reshape(recorded.shape)
    return outputs


FAMILIES = {"stdit3_v12": Adapter("stdit3", replay)}
