"""DiT: facebookresearch/DiT (DiT-XL-2-256x256.pt, -512x512.pt), the transformer/ folder that diffusers made of it
(facebook/DiT-XL-2-256), and Open-Sora 1.0's port to video."""

from opensora_jax.weights.engine import Rule, conv, copy, drop, linear, mlp
from opensora_jax.weights.layouts import COPIES, Join, check_diffusers, joins, transformer_block, two_layers
from opensora_jax.weights.open_sora import CAPTIONS, dimensions, embedder, self_attention, spoken
from opensora_jax.weights.open_sora import twice_the_channels as learn_sigma

RULES: list[Rule] = [
    *conv("x_embedder.proj", "x_embedder/proj"),
    *embedder("t_embedder"),
    *CAPTIONS,
    copy("y_embedder.embedding_table.weight", "y_embedder/table/embedding"),
    *linear("blocks.{layer}.adaLN_modulation.1", "blocks/modulation"),
    *self_attention("blocks.{layer}.attn", "blocks/attn"),
    *mlp("blocks.{layer}.mlp", "blocks/mlp"),
    *linear("final_layer.adaLN_modulation.1", "final_layer/modulation"),
    *linear("final_layer.linear", "final_layer/linear"),
    drop("pos_embed"),
    drop("pos_embed_spatial"),
    drop("pos_embed_temporal"),
]

NORM = "transformer_blocks.{n}.norm1."
CLASSES = NORM + "emb.class_embedder.embedding_table.weight"
JOINS: list[Join] = [  # diffusers' DiTTransformer2DModel: every layer has its own copy of the embedders
    *transformer_block(),
    *two_layers("t_embedder", NORM + "emb.timestep_embedder", merge=COPIES),
    Join("y_embedder.embedding_table.weight", (CLASSES,), COPIES),
    *joins("blocks.{n}.adaLN_modulation.1", NORM + "linear"),
    *joins("final_layer.adaLN_modulation.1", "proj_out_1"),
    *joins("final_layer.linear", "proj_out_2"),
]


def recognise(shapes, config: dict) -> bool:
    """Open-Sora's Latte has the same names as its DiT: without a word in the config this one is assumed."""
    original = "blocks.0.adaLN_modulation.1.weight" in shapes and not of_latte(shapes, config)
    return original or CLASSES.format(n=0) in shapes


def layout(shapes, config: dict) -> list[Join]:
    if CLASSES.format(n=0) not in shapes:
        return []
    check_diffusers(config, "ada_norm_zero")
    return JOINS


def of_latte(shapes, config: dict) -> bool:
    named = (config.get("_class_name"), config.get("model_type"), config.get("type"), config.get("family"))
    return "temp_embed" in shapes or any("latte" in str(name).lower() for name in named)


def config_from(shapes, config: dict) -> dict:
    found = dimensions(shapes, config) | {"learn_sigma": learn_sigma(shapes)} | condition(shapes, config)
    if "pos_embed" in shapes:  # the original: images only
        found["no_temporal_pos_emb"] = True
    if "num_embeds_ada_norm" in config:
        found |= of_diffusers(config)
    return found | spoken(config, "no_temporal_pos_emb")


def of_diffusers(config: dict) -> dict:
    """diffusers differs a little from what it converts: the timestep's frequencies, the MLP's norm, and positions that
    stretch to other sizes. We follow it, so that its folders give its results."""
    return dict(
        num_heads=config.get("num_attention_heads", 16),
        no_temporal_pos_emb=True,
        frequency_shift=1,
        mlp_norm_eps=config.get("norm_eps", 1e-5),
        base_size=config.get("sample_size", 32) // config.get("patch_size", 2),
    )


def condition(shapes, config: dict) -> dict:
    """What y is; a table of classes holds one more for the null class unless classes are never dropped."""
    table = shapes.get("y_embedder.embedding_table.weight")
    if table is not None:
        drop_prob = spoken(config, "class_dropout_prob")
        return {"condition": f"label_{table[0] - (drop_prob.get('class_dropout_prob', 0.1) > 0)}"} | drop_prob
    if "y_embedder.y_proj.fc1.weight" in shapes:
        return {"condition": "text", "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1]}
    return {}
