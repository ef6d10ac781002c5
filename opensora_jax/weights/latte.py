"""Latte: Vchitect/Latte (maxin-cn/Latte: ucf101.pt, ffs.pt, skytimelapse.pt, taichi-hd.pt) and Open-Sora 1.0's port."""

from opensora_jax.weights import dit
from opensora_jax.weights.engine import Rule, drop, linear

RULES: list[Rule] = [
    *dit.RULES,
    *linear("text_embedding_projection.1", "y_embedder"),
    drop("temp_embed"),
]


def recognise(shapes, config: dict) -> bool:
    return "blocks.0.adaLN_modulation.1.weight" in shapes and dit.of_latte(shapes, config)


def config_from(shapes, config: dict) -> dict:
    found = dit.config_from(shapes, config)
    found.pop("no_temporal_pos_emb", None)  # always with positions in time
    if "text_embedding_projection.1.weight" in shapes:
        tokens = 77  # of CLIP, fixed in the reference
        return found | {
            "condition": "flat_text",
            "model_max_length": tokens,
            "caption_channels": shapes["text_embedding_projection.1.weight"][1] // tokens,
        }
    return {"condition": "none"} | found
