"""Latte of Open-Sora-Plan, with text (and joint images) and without."""

import jax

from opensora_jax.nn import taps
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

INTERMEDIATES = {
    "tokens": "pos_embed",
    "t_block_out": "adaln_single",
    "y_emb": "caption_projection",
    "0/spatial_out": "transformer_block_0",
    "0/temporal_out": "temporal_block_0",
}


def replay(case: Case, run: str) -> dict:
    net, params, _ = case.load("models", "latte_t2v")
    given, args = case.tensors(run), case.args(run)
    images = args.get("use_image_num", 0) if args.get("train") else 0  # outside training all frames are the video's
    options = {
        "images": images,
        "temporal": args.get("enable_temporal_attentions", args.get("temporal", True)),
        # The reference forgets temporal positions in joint training without gradient checkpointing.
        "place": not (images and not args.get("gradient_checkpointing")),
    }

    @jax.jit
    def forward(params, *arrays):
        with taps.record() as seen:
            out = net(params, *arrays, **options)
        return out, dict(seen)

    text = (given.get("encoder_hidden_states"), given.get("encoder_attention_mask"))
    out, seen = forward(params, channels_last(given["hidden_states"]), given["timestep"], *text)
    outputs = {"sample": channels_first(out)}
    for name, recorded_name in INTERMEDIATES.items():
        recorded = case.outputs.get(f"{run}/inter.{recorded_name}")
        if recorded is not None:
            value = seen[name].swapaxes(1, 2) if name == "0/temporal_out" else seen[name]
            outputs[f"inter.{recorded_name}"] = value.reshape(recorded.shape)
    return outputs


FAMILIES = {"osp_latte_t2v": Adapter("latte_t2v", replay), "osp_latte": Adapter("latte_t2v", replay)}
