"""HunyuanVideo's VAE: Open-Sora 2.0's hunyuan_vae.safetensors, Tencent's own file and diffusers'
AutoencoderKLHunyuanVideo, which share their names."""

from opensora_jax.weights.engine import Rule, conv, linear, norm, reshape, within

# 1 x 1 x 1 convolutions are the linear maps that they are.
POINTWISE = reshape("pointwise", lambda a: a[:, :, 0, 0, 0].T, lambda a: a.T[:, :, None, None, None])


def pointwise(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", POINTWISE), Rule(f"{source}.bias", f"{target}/bias")]


RESNET = [
    *norm("norm1", "norm1"),
    *conv("conv1.conv", "conv1"),
    *norm("norm2", "norm2"),
    *conv("conv2.conv", "conv2"),
    *conv("conv_shortcut.conv", "shortcut"),
]
ATTENTION = [
    *norm("group_norm", "norm"),
    *linear("to_{part:q|k|v}", "{part}"),
    *linear("to_out.0", "proj"),
]
HALF = "{half:encoder|decoder}."
RULES: list[Rule] = [
    *conv(HALF + "conv_in.conv", "{half}/conv_in"),
    *within("encoder.down_blocks.{n}.resnets.{i}.", "encoder/stages/{n}/resnets/{i}/", RESNET),
    *conv("encoder.down_blocks.{n}.downsamplers.0.conv.conv", "encoder/stages/{n}/resample"),
    *within("decoder.up_blocks.{n}.resnets.{i}.", "decoder/stages/{n}/resnets/{i}/", RESNET),
    *conv("decoder.up_blocks.{n}.upsamplers.0.conv.conv", "decoder/stages/{n}/resample"),
    *within(HALF + "mid_block.resnets.{i}.", "{half}/mid/resnets/{i}/", RESNET),
    *within(HALF + "mid_block.attentions.0.", "{half}/mid/attention/", ATTENTION),
    *norm(HALF + "conv_norm_out", "{half}/norm_out"),
    *conv(HALF + "conv_out.conv", "{half}/conv_out"),
    *pointwise("quant_conv", "quant_conv"),
    *pointwise("post_quant_conv", "post_quant_conv"),
]


def recognise(shapes, config: dict) -> bool:
    return (
        "encoder.down_blocks.0.resnets.0.conv1.conv.weight" in shapes
        and "decoder.up_blocks.0.upsamplers.0.conv.conv.weight" in shapes
        and len(shapes.get("quant_conv.weight", ())) == 5
    )


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.hunyuan_vae.Config, from shapes and, for what they do not tell, from either config."""
    widths = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.conv.weight") in shapes:
        widths.append(shapes[name][0])
    first = [
        name for name in shapes if name.startswith("encoder.down_blocks.0.") and name.endswith("conv1.conv.weight")
    ]
    found = dict(
        in_channels=shapes["encoder.conv_in.conv.weight"][1],
        out_channels=shapes["decoder.conv_out.conv.weight"][0],
        latent_channels=shapes["post_quant_conv.weight"][0],
        block_out_channels=tuple(widths),
        layers_per_block=len(first),
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )
    spoken = (
        "norm_num_groups", "act_fn", "time_compression_ratio", "spatial_compression_ratio", "scale_factor",
        "shift_factor", "use_slicing", "use_spatial_tiling", "use_temporal_tiling", "sample_size", "sample_tsize",
        "tile_overlap_factor",
    )  # fmt: skip
    diffusers = {"scaling_factor": "scale_factor", "temporal_compression_ratio": "time_compression_ratio"}
    config = {diffusers.get(key, key): value for key, value in config.items()}
    found |= {key: config[key] for key in spoken if config.get(key) is not None}
    if isinstance(found.get("sample_size"), list | tuple):
        found["sample_size"] = found["sample_size"][0]
    return found
