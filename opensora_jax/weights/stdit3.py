"""STDiT3 of Open-Sora 1.2: hpcai-tech/OpenSora-STDiT-v3 (config.json + safetensors)."""

from opensora_jax.weights.engine import Rule, copy
from opensora_jax.weights.open_sora import AROUND, captions, dimensions, embedder, spoken, text_block
from opensora_jax.weights.open_sora import twice_the_channels as pred_sigma

RULES: list[Rule] = [
    *AROUND,
    *embedder("fps_embedder"),
    copy("rope.freqs", "rope_freqs"),
    *text_block("{kind:spatial|temporal}_blocks.{layer}", "{kind}_blocks"),
]


def recognise(shapes, config: dict) -> bool:
    """Told from its relatives by fps but no size embedders, and no condition patch embedders (1.3 has those)."""
    return (
        "spatial_blocks.0.attn.qkv.weight" in shapes
        and "fps_embedder.mlp.0.weight" in shapes
        and "x_embedder_cond.proj.weight" not in shapes
    )


def config_from(shapes, config: dict) -> dict:
    """Arguments of models.stdit3.Config, from a config.json where it speaks and from shapes where it does not."""
    found = dimensions(shapes, config, "spatial_blocks") | captions(shapes)
    found |= dict(
        num_heads=found["hidden_size"] // (2 * shapes["rope.freqs"][0]),
        pred_sigma=pred_sigma(shapes),
        qk_norm="spatial_blocks.0.attn.q_norm.weight" in shapes,
    )
    return found | spoken(config, "input_sq_size", "drop_path", "skip_y_embedder")
