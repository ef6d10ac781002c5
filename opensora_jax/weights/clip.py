"""CLIP's text model: openai/clip-vit-* (config.json + weights; the vision half of the file is left out)."""

from opensora_jax.weights.engine import LINEAR, Rule, drop, embed, linear, mlp, norm

LAYER = "text_model.encoder.layers.{layer}."

RULES: list[Rule] = [
    embed("text_model.embeddings.token_embedding", "tokens"),
    embed("text_model.embeddings.position_embedding", "positions"),
    drop("text_model.embeddings.position_ids"),
    *norm(LAYER + "layer_norm1", "blocks/norm1"),
    *linear(LAYER + "self_attn.q_proj", "blocks/q"),
    *linear(LAYER + "self_attn.k_proj", "blocks/k"),
    *linear(LAYER + "self_attn.v_proj", "blocks/v"),
    *linear(LAYER + "self_attn.out_proj", "blocks/o"),
    *norm(LAYER + "layer_norm2", "blocks/norm2"),
    *mlp(LAYER + "mlp", "blocks/mlp"),
    *norm("text_model.final_layer_norm", "final_norm"),
    Rule("text_projection.weight", "projection/kernel", LINEAR),
    drop("{half:vision_model|visual_projection}.{rest:.+}"),
    drop("logit_scale"),
]


def recognise(shapes, config: dict) -> bool:
    return "text_model.embeddings.token_embedding.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of text.clip.Config. Heads are 64 wide in every published CLIP, where config.json says nothing."""
    config = config.get("text_config") or config
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    found = dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=sum(
            name.startswith("text_model.encoder.layers.") and name.endswith("q_proj.weight") for name in shapes
        ),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
        projection_dim=shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None,
    )
    spoken = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")
    return found | {key: config[key] for key in spoken if config.get(key) is not None}
