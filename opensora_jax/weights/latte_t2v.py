"""Latte of Open-Sora-Plan 1.0: LanguageBind/Open-Sora-Plan-v1.0.0 (diffusers layout), with and without text."""

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.weights.engine import CONV, Rule, copy, count_layers, linear, norm, reshape

FRAME_CONV = reshape(  # [O, I, kh, kw] ↔ [1, kh, kw, I, O]
    "frame_conv", lambda a: CONV.forward(a)[None], lambda a: CONV.back(a[0])
)


def _blocks(source: str, ours: str) -> list[Rule]:
    source, ours = source + ".{layer}.", ours + "/"
    attention = [
        rule
        for name in ("attn1", "attn2")
        for theirs, part in {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}.items()
        for rule in linear(f"{source}{name}.{theirs}", f"{ours}{name}/{part}")
    ]
    return [
        copy(source + "scale_shift_table", ours + "scale_shift_table"),
        *norm(source + "norm1", ours + "norm1"),
        *attention,
        *linear(source + "ff.net.0.proj", ours + "ff/fc1"),
        *linear(source + "ff.net.2", ours + "ff/fc2"),
    ]


RULES: list[Rule] = [
    Rule("pos_embed.proj.weight", "x_embedder/proj/kernel", FRAME_CONV),
    copy("pos_embed.proj.bias", "x_embedder/proj/bias"),
    *linear("adaln_single.emb.timestep_embedder.linear_1", "t_embedder/fc1"),
    *linear("adaln_single.emb.timestep_embedder.linear_2", "t_embedder/fc2"),
    *linear("adaln_single.linear", "t_block"),
    *linear("caption_projection.linear_1", "y_embedder/y_proj/fc1"),
    *linear("caption_projection.linear_2", "y_embedder/y_proj/fc2"),
    copy("caption_projection.y_embedding", "y_embedder/null"),
    copy("class_embedder.embedding_table.weight", "label_embedder/table/embedding"),  # ours: 1.0 has no such model
    *_blocks("transformer_blocks", "spatial_blocks"),
    *_blocks("temporal_transformer_blocks", "temporal_blocks"),
    # The MLP's norm (only with norm_affine) is called norm2 where there is cross-attention and norm3 elsewhere.
    *norm("transformer_blocks.{layer}.norm2", "spatial_blocks/norm2"),
    *norm("transformer_blocks.{layer}.norm3", "spatial_blocks/norm3"),
    *norm("temporal_transformer_blocks.{layer}.norm3", "temporal_blocks/norm3"),
    copy("scale_shift_table", "final_layer/scale_shift_table"),
    *linear("proj_out", "final_layer/linear"),
]


def recognise(shapes, config: dict) -> bool:
    return "temporal_transformer_blocks.0.scale_shift_table" in shapes and "pos_embed.proj.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of models.latte_t2v.Config, from a config.json where it speaks and from shapes where it does not."""
    if config.get("norm_type", "ada_norm_single") != "ada_norm_single":
        raise UserError(f"norm_type={config['norm_type']!r}: only ada_norm_single checkpoints of Latte can be loaded")
    hidden, channels, patch, _ = shapes["pos_embed.proj.weight"]
    text = "caption_projection.linear_1.weight" in shapes
    found = dict(
        in_channels=channels,
        out_channels=shapes["proj_out.weight"][0] // patch**2,
        patch_size=patch,
        hidden_size=hidden,
        depth=count_layers(shapes, "transformer_blocks"),
        num_heads=config.get("num_attention_heads") or max(hidden // 72, 1),
        caption_channels=shapes["caption_projection.linear_1.weight"][1] if text else 0,
        attention_bias="transformer_blocks.0.attn1.to_q.bias" in shapes,
        norm_affine="transformer_blocks.0.norm1.weight" in shapes,
    )
    if text:
        found["caption_tokens"] = shapes.get("caption_projection.y_embedding", (0,))[0]  # diffusers has no null caption
    if "class_embedder.embedding_table.weight" in shapes:
        found["num_classes"] = shapes["class_embedder.embedding_table.weight"][0] - 1
    ours = {"norm_eps": "norm_eps", "activation_fn": "activation", "video_length": "video_length"}
    found |= {ours[key]: config[key] for key in ours if config.get(key) is not None}
    if "video_length" in config and isinstance(config.get("sample_size"), int):
        found["video_length"] = (
            5  # Vchitect's, of square latents, never stretches time: 5 is the length with unit steps
        )
    found["only_cross_attention"] = bool(config.get("only_cross_attention")) and text
    size = config.get("sample_size")
    if size is not None:
        found["sample_size"] = tuple(np.broadcast_to(size, 2).tolist())
    return found
