"""T5's encoder: google/t5-v1_1-*, DeepFloyd/t5-v1_1-xxl (config.json + weights; a decoder in the file is left out)."""

from opensora_jax.weights.engine import LINEAR, Rule, copy, drop, embed, tied

LAYER = "encoder.block.{layer}.layer."
ATTENTION = LAYER + "0.SelfAttention."
FEED_FORWARD = LAYER + "1.DenseReluDense."

RULES: list[Rule] = [
    embed("shared", "shared"),
    tied("encoder.embed_tokens.weight", "shared/embedding"),
    copy("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    *(Rule(f"{ATTENTION}{name}.weight", f"blocks/{name}/kernel", LINEAR) for name in "qkvo"),
    copy(LAYER + "0.layer_norm.weight", "blocks/norm1/scale"),
    Rule(FEED_FORWARD + "wi.weight", "blocks/wi/kernel", LINEAR),
    Rule(FEED_FORWARD + "wi_0.weight", "blocks/gate/kernel", LINEAR),
    Rule(FEED_FORWARD + "wi_1.weight", "blocks/up/kernel", LINEAR),
    Rule(FEED_FORWARD + "wo.weight", "blocks/wo/kernel", LINEAR),
    copy(LAYER + "1.layer_norm.weight", "blocks/norm2/scale"),
    copy("encoder.final_layer_norm.weight", "final_norm/scale"),
    drop("{half:decoder|lm_head}.{rest:.+}"),
]


def recognise(shapes, config: dict) -> bool:
    return "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of text.t5.Config, from shapes and, for what they do not tell, from config.json."""
    first = "encoder.block.0.layer."
    buckets, heads = shapes[first + "0.SelfAttention.relative_attention_bias.weight"]
    vocab, width = shapes["shared.weight"]
    gated = first + "1.DenseReluDense.wi_0.weight" in shapes
    found = dict(
        vocab_size=vocab,
        d_model=width,
        d_kv=shapes[first + "0.SelfAttention.q.weight"][0] // heads,
        d_ff=shapes[first + "1.DenseReluDense.wo.weight"][1],
        num_layers=sum(
            name.startswith("encoder.block.") and name.endswith("SelfAttention.q.weight") for name in shapes
        ),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    spoken = ("feed_forward_proj", "relative_attention_max_distance", "layer_norm_epsilon")
    return found | {key: config[key] for key in spoken if config.get(key) is not None}
