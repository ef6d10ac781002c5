"""STDiT of Open-Sora 1.0: hpcai-tech/Open-Sora, OpenSora-v1-*.pth (a bare state dict)."""

from opensora_jax.weights.engine import Rule, drop
from opensora_jax.weights.open_sora import AROUND, captions, dimensions, self_attention, spoken, text_block
from opensora_jax.weights.open_sora import twice_the_channels as pred_sigma

RULES: list[Rule] = [
    *AROUND,
    *text_block("blocks.{layer}", "blocks"),
    *self_attention("blocks.{layer}.attn_temp", "blocks/attn_temp"),
    drop("pos_embed"),
    drop("pos_embed_temporal"),
]


def recognise(shapes, config: dict) -> bool:
    return "blocks.0.attn_temp.qkv.weight" in shapes and "t_block_temp.1.weight" not in shapes


def config_from(shapes, config: dict) -> dict:
    found = dimensions(shapes, config) | captions(shapes) | {"pred_sigma": pred_sigma(shapes)}
    scales = spoken(config, "space_scale", "time_scale") if config else released_scales(shapes)
    return found | scales | spoken(config, "drop_path")


def released_scales(shapes) -> dict:
    """A bare state dict does not tell its position scales; those of the released sizes follow from its tables."""
    patches = shapes["pos_embed"][1] if "pos_embed" in shapes else 1024
    frames = shapes["pos_embed_temporal"][1] if "pos_embed_temporal" in shapes else 16
    return {"space_scale": 0.5 if patches <= 256 else 1.0, "time_scale": 2 / 3 if frames > 16 else 1.0}
