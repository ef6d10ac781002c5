"""Names and shapes that the networks of Open-Sora 1.x (and PixArt, DiT, Latte before them) have in common."""

from math import prod

from opensora_jax.weights.engine import Rule, conv, copy, count_layers, linear, mlp

HEAD_DIM = 72  # of every released network: what is assumed where neither shapes nor config tell


def embedder(source: str, target: str = "") -> list[Rule]:
    """Timestep and size embedders: mlp.0, SiLU, mlp.2."""
    target = target or source
    return linear(f"{source}.mlp.0", f"{target}/fc1") + linear(f"{source}.mlp.2", f"{target}/fc2")


def self_attention(source: str, target: str) -> list[Rule]:
    return [
        *linear(f"{source}.qkv", f"{target}/qkv"),
        *linear(f"{source}.proj", f"{target}/proj"),
        copy(f"{source}.q_norm.weight", f"{target}/q_norm/scale"),
        copy(f"{source}.k_norm.weight", f"{target}/k_norm/scale"),
    ]


def cross_attention(source: str, target: str) -> list[Rule]:
    return [
        rule for name in ("q_linear", "kv_linear", "proj") for rule in linear(f"{source}.{name}", f"{target}/{name}")
    ]


def text_block(source: str, target: str) -> list[Rule]:
    """Self-attention, cross-attention, MLP and the table that modulates them (PixArt's block, and what grew from it)."""
    return [
        *self_attention(f"{source}.attn", f"{target}/attn"),
        *cross_attention(f"{source}.cross_attn", f"{target}/cross_attn"),
        *mlp(f"{source}.mlp", f"{target}/mlp"),
        copy(f"{source}.scale_shift_table", f"{target}/scale_shift_table"),
    ]


CAPTIONS: list[Rule] = [
    *mlp("y_embedder.y_proj", "y_embedder/y_proj"),
    copy("y_embedder.y_embedding", "y_embedder/null"),
]

# Everything around the blocks of a network with one timestep projection for all layers.
AROUND: list[Rule] = [
    *conv("x_embedder.proj", "x_embedder/proj"),
    *embedder("t_embedder"),
    *linear("t_block.1", "t_block"),
    *CAPTIONS,
    *linear("final_layer.linear", "final_layer/linear"),
    copy("final_layer.scale_shift_table", "final_layer/scale_shift_table"),
]


def dimensions(shapes, config: dict, blocks: str = "blocks") -> dict:
    """Constructor arguments that shapes tell; the number of heads is the config's, else of HEAD_DIM each."""
    hidden, channels, *patch = shapes["x_embedder.proj.weight"]
    return dict(
        in_channels=channels,
        patch_size=tuple(patch),
        hidden_size=hidden,
        depth=count_layers(shapes, blocks),
        num_heads=config.get("num_heads") or max(1, hidden // HEAD_DIM),
        mlp_ratio=shapes[f"{blocks}.0.mlp.fc1.weight"][0] / hidden,
    )


def twice_the_channels(shapes) -> bool:
    """Does the network also predict sigma?"""
    _, channels, *patch = shapes["x_embedder.proj.weight"]
    return shapes["final_layer.linear.weight"][0] == 2 * channels * prod(patch)


def captions(shapes) -> dict:
    """diffusers drops the null caption: the encoder's output for an empty prompt takes its place."""
    width = shapes["y_embedder.y_proj.fc1.weight"][1]
    return dict(caption_channels=width, model_max_length=shapes.get("y_embedder.y_embedding", (0, width))[0])


def spoken(config: dict, *keys: str) -> dict:
    """What only a config.json can tell, where it does."""
    return {key: config[key] for key in keys if config.get(key) is not None}
