"""PixArt: PixArt-alpha/PixArt-alpha and PixArt-Sigma (*.pth, a `state_dict` inside), the transformer/ folders that
diffusers made of them (PixArt-alpha/PixArt-XL-2-1024-MS), and Open-Sora's ports of both."""

from math import isqrt

from opensora_jax.common.errors import UserError
from opensora_jax.weights.engine import Rule, conv, drop, norm
from opensora_jax.weights.layouts import Join, check_diffusers, joins, transformer_block, two_layers
from opensora_jax.weights.open_sora import AROUND, captions, dimensions, embedder, spoken, text_block
from opensora_jax.weights.open_sora import twice_the_channels as pred_sigma

RULES: list[Rule] = [
    *AROUND,
    *embedder("csize_embedder"),
    *embedder("ar_embedder"),
    *text_block("blocks.{layer}", "blocks"),
    *conv("blocks.{layer}.attn.sr", "compressors/{layer}/sr"),
    *norm("blocks.{layer}.attn.norm", "compressors/{layer}/norm"),
    drop("pos_embed"),
    drop("pos_embed_temporal"),
]

BLOCK = "transformer_blocks.{n}."
JOINS: list[Join] = [  # diffusers' PixArtTransformer2DModel
    *transformer_block(),
    *joins("blocks.{n}.cross_attn.q_linear", BLOCK + "attn2.to_q"),
    *joins("blocks.{n}.cross_attn.kv_linear", BLOCK + "attn2.to_k", BLOCK + "attn2.to_v"),
    *joins("blocks.{n}.cross_attn.proj", BLOCK + "attn2.to_out.0"),
    Join("blocks.{n}.scale_shift_table", (BLOCK + "scale_shift_table",)),
    *two_layers("t_embedder", "adaln_single.emb.timestep_embedder"),
    *two_layers("csize_embedder", "adaln_single.emb.resolution_embedder"),
    *two_layers("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
    *joins("t_block.1", "adaln_single.linear"),
    *two_layers("y_embedder.y_proj", "caption_projection", "fc1", "fc2"),
    Join("y_embedder.y_embedding", ("caption_projection.y_embedding",)),  # only early conversions have one
    Join("final_layer.scale_shift_table", ("scale_shift_table",)),
    *joins("final_layer.linear", "proj_out"),
]


def of_diffusers(shapes) -> bool:
    return (
        "adaln_single.linear.weight" in shapes
        and "transformer_blocks.0.attn2.to_q.weight" in shapes
        and not any(name.startswith("temporal_transformer_blocks.") for name in shapes)
    )


def layout(shapes, config: dict) -> list[Join]:
    if not of_diffusers(shapes):
        return []
    check_diffusers(config, "ada_norm_single", norm_eps=1e-6)
    return JOINS


def recognise(shapes, config: dict) -> bool:
    return of_diffusers(shapes) or (
        "t_block.1.weight" in shapes
        and "blocks.0.cross_attn.q_linear.weight" in shapes
        and "blocks.0.attn_temp.qkv.weight" not in shapes
    )


def config_from(shapes, config: dict) -> dict:
    if config.get("window_size") or config.get("window_block_indexes"):
        raise UserError("PixArt with window attention was never released and is not supported")
    if "num_attention_heads" in config:
        config = config | {"num_heads": config["num_attention_heads"]}
    found = dimensions(shapes, config) | captions(shapes)
    image = len(found["patch_size"]) == 2
    found |= dict(
        pred_sigma=pred_sigma(shapes),
        micro_condition="csize_embedder.mlp.0.weight" in shapes,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        no_temporal_pos_emb=image,
        **positions(shapes, config),
        **compression(shapes, config),
    )
    return found | spoken(config, "no_temporal_pos_emb", "time_scale", "drop_path")


def positions(shapes, config: dict) -> dict:
    """The side of the training grid, in patches, and how far apart its positions are. A bare state dict tells the side
    by its table; the released networks keep the spacing of 512 px (alpha at 256 px: of 256 px)."""
    *_, patch, _ = shapes["x_embedder.proj.weight"]
    if "sample_size" in config:  # diffusers
        scale = config.get("interpolation_scale")
        scale = max(config["sample_size"] // 64, 1) if scale is None else scale
        return {"base_size": config["sample_size"] // patch, "space_scale": scale}
    size = config.get("input_size")
    if config.get("base_size") is not None:
        base = config["base_size"] // patch
    elif isinstance(size, int):
        base = size // patch
    elif size is not None:
        base = isqrt((size[-2] // patch) * (size[-1] // patch))
    else:
        base = isqrt(shapes["pos_embed"][1]) if "pos_embed" in shapes else 16
    for name in ("space_scale", "lewei_scale", "pe_interpolation"):
        if config.get(name) is not None:
            return {"base_size": base, "space_scale": config[name]}
    sigma = shapes["y_embedder.y_embedding"][0] > 120
    return {"base_size": base, "space_scale": 1.0 if config or (base < 32 and not sigma) else base / 32}


def compression(shapes, config: dict) -> dict:
    """Layers with a learned compression tell themselves; the other kinds leave no trace in the weights."""
    stated = config.get("kv_compress_config") or {}
    learned = {int(name.split(".")[1]): shape for name, shape in shapes.items() if name.endswith("attn.sr.weight")}
    if learned:
        return {"kv_compress_layers": tuple(sorted(learned)), "kv_compress_factor": learned[min(learned)][-1]}
    factor, layers = int(stated.get("scale_factor", 1)), tuple(stated.get("kv_compress_layer", ()))
    if factor == 1 or not layers:
        return {}
    return {
        "kv_compress_layers": layers,
        "kv_compress_factor": factor,
        "kv_compress_sampling": stated["sampling"],
    }
