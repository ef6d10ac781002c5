"""STDiT3 of Open-Sora 1.3: hpcai-tech/OpenSora-STDiT-v4, -v4-360p, -v4-i2v (config.json + safetensors)."""

from opensora_jax.weights.engine import Rule, conv, copy
from opensora_jax.weights.open_sora import AROUND, HEAD_DIM, captions, dimensions, embedder, spoken, text_block
from opensora_jax.weights.open_sora import twice_the_channels as pred_sigma

RULES: list[Rule] = [
    *AROUND,
    *conv("x_embedder_cond.proj", "x_embedder_cond/proj"),
    *conv("x_embedder_cond_mask.proj", "x_embedder_cond_mask/proj"),
    *embedder("fps_embedder"),
    copy("rope.freqs", "rope_freqs"),
    *text_block("{kind:spatial|temporal}_blocks.{layer}", "{kind}_blocks"),
]


def recognise(shapes, config: dict) -> bool:
    return "x_embedder_cond.proj.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    found = dimensions(shapes, config, "spatial_blocks") | captions(shapes)
    rotated = 2 * shapes["rope.freqs"][0]
    if config:
        windows = spoken(config, "kernel_size", "use_spatial_rope")
    else:  # a bare state dict: a third of a head is rotated in the released, windowed network
        windows = {"kernel_size": (8, 8, -1), "use_spatial_rope": True} if 3 * rotated == HEAD_DIM else {}
    if "kernel_size" in windows:
        windows["kernel_size"] = tuple(windows["kernel_size"])
    found |= dict(
        num_heads=found["hidden_size"] // (rotated * (3 if "kernel_size" in windows else 1)),
        pred_sigma=pred_sigma(shapes),
        qk_norm="spatial_blocks.0.attn.q_norm.weight" in shapes,
        skip_temporal="temporal_blocks.0.attn.qkv.weight" not in shapes,
    )
    return found | windows | spoken(config, "input_sq_size", "drop_path", "skip_y_embedder")
