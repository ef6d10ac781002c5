"""STDiT3 of Open-Sora 1.2: hpcai-tech/OpenSora-STDiT-v3 (config.json + safetensors)."""

from opensora_jax.weights.engine import Rule, conv, copy, linear, mlp

BLOCK = "{kind:spatial|temporal}_blocks.{layer}."
OURS = "{kind}_blocks/"

RULES: list[Rule] = [
    *conv("x_embedder.proj", "x_embedder/proj"),
    *linear("t_embedder.mlp.0", "t_embedder/fc1"),
    *linear("t_embedder.mlp.2", "t_embedder/fc2"),
    *linear("fps_embedder.mlp.0", "fps_embedder/fc1"),
    *linear("fps_embedder.mlp.2", "fps_embedder/fc2"),
    *linear("t_block.1", "t_block"),
    *mlp("y_embedder.y_proj", "y_embedder/y_proj"),
    copy("y_embedder.y_embedding", "y_embedder/null"),
    copy("rope.freqs", "rope_freqs"),
    copy(BLOCK + "scale_shift_table", OURS + "scale_shift_table"),
    *linear(BLOCK + "attn.qkv", OURS + "attn/qkv"),
    *linear(BLOCK + "attn.proj", OURS + "attn/proj"),
    copy(BLOCK + "attn.q_norm.weight", OURS + "attn/q_norm/scale"),
    copy(BLOCK + "attn.k_norm.weight", OURS + "attn/k_norm/scale"),
    *linear(BLOCK + "cross_attn.q_linear", OURS + "cross_attn/q_linear"),
    *linear(BLOCK + "cross_attn.kv_linear", OURS + "cross_attn/kv_linear"),
    *linear(BLOCK + "cross_attn.proj", OURS + "cross_attn/proj"),
    *mlp(BLOCK + "mlp", OURS + "mlp"),
    *linear("final_layer.linear", "final_layer/linear"),
    copy("final_layer.scale_shift_table", "final_layer/scale_shift_table"),
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
    hidden, channels, *patch = shapes["x_embedder.proj.weight"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("spatial_blocks."))
    head = shapes["rope.freqs"][0] * 2
    per_patch = shapes["final_layer.linear.weight"][0] // (patch[0] * patch[1] * patch[2])
    tokens, caption = shapes["y_embedder.y_embedding"]
    found = dict(
        in_channels=channels,
        patch_size=tuple(patch),
        hidden_size=hidden,
        depth=depth,
        num_heads=hidden // head,
        mlp_ratio=shapes["spatial_blocks.0.mlp.fc1.weight"][0] / hidden,
        pred_sigma=per_patch == 2 * channels,
        caption_channels=caption,
        model_max_length=tokens,
        qk_norm="spatial_blocks.0.attn.q_norm.weight" in shapes,
    )
    spoken = ("input_sq_size", "drop_path", "qk_norm_legacy", "skip_y_embedder")
    return found | {key: config[key] for key in spoken if config.get(key) is not None}
