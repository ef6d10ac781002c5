"""STDiT2 of Open-Sora 1.1: hpcai-tech/OpenSora-STDiT-v2-stage2 and -stage3 (config.json + safetensors)."""

from opensora_jax.weights.engine import Rule, copy, linear
from opensora_jax.weights.open_sora import AROUND, captions, dimensions, embedder, self_attention, spoken, text_block
from opensora_jax.weights.open_sora import twice_the_channels as pred_sigma

RULES: list[Rule] = [
    *AROUND,
    *linear("t_block_temp.1", "t_block_temp"),
    *embedder("csize_embedder"),
    *embedder("ar_embedder"),
    *embedder("fl_embedder"),
    *embedder("fps_embedder"),
    copy("rope.freqs", "rope_freqs"),
    *text_block("blocks.{layer}", "blocks"),
    *self_attention("blocks.{layer}.attn_temp", "blocks/attn_temp"),
    copy("blocks.{layer}.scale_shift_table_temporal", "blocks/scale_shift_table_temporal"),
]


def recognise(shapes, config: dict) -> bool:
    return "t_block_temp.1.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    found = dimensions(shapes, config) | captions(shapes)
    found |= dict(
        num_heads=found["hidden_size"] // (2 * shapes["rope.freqs"][0]),
        pred_sigma=pred_sigma(shapes),
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
    )
    return found | spoken(config, "input_sq_size", "drop_path", "qk_norm_legacy")
