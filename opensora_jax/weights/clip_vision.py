"""CLIP's image model: openai/clip-vit-* (config.json + weights; the text half of the file is left out)."""

from opensora_jax.weights.engine import CONV, LINEAR, Rule, copy, drop, embed, linear, mlp, norm

LAYER = "vision_model.encoder.layers.{layer}."

RULES: list[Rule] = [
    copy("vision_model.embeddings.class_embedding", "class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "patches/kernel", CONV),
    embed("vision_model.embeddings.position_embedding", "positions"),
    drop("vision_model.embeddings.position_ids"),
    *norm("vision_model.pre_layrnorm", "norm_in"),  # spelled so
    *norm(LAYER + "layer_norm1", "blocks/norm1"),
    *linear(LAYER + "self_attn.q_proj", "blocks/q"),
    *linear(LAYER + "self_attn.k_proj", "blocks/k"),
    *linear(LAYER + "self_attn.v_proj", "blocks/v"),
    *linear(LAYER + "self_attn.out_proj", "blocks/o"),
    *norm(LAYER + "layer_norm2", "blocks/norm2"),
    *mlp(LAYER + "mlp", "blocks/mlp"),
    *norm("vision_model.post_layernorm", "norm_out"),
    Rule("visual_projection.weight", "projection/kernel", LINEAR),
    drop("{half:text_model|text_projection}.{rest:.+}"),
    drop("logit_scale"),
]


def recognise(shapes, config: dict) -> bool:
    """A whole CLIP is its text model, unless it is asked for by this name."""
    return "visual_projection.weight" in shapes and "text_model.embeddings.token_embedding.weight" not in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of models.clip_vision.Config. Heads are 64 wide in every published CLIP."""
    config = config.get("vision_config") or config
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    grid = round((shapes["vision_model.embeddings.position_embedding.weight"][0] - 1) ** 0.5)
    layers = [
        name for name in shapes if name.startswith("vision_model.encoder.layers.") and name.endswith("q_proj.weight")
    ]
    found = dict(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        projection_dim=shapes["visual_projection.weight"][0],
    )
    spoken = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    return found | {key: config[key] for key in spoken if config.get(key) is not None}
