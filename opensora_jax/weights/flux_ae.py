"""FLUX.1's autoencoder under Black Forest Labs' names (ae.safetensors), filling vaes/sd_vae.py. The decoder's stages
are counted from full size there and from the latents here, so its rules are spelled out for the four that exist."""

from opensora_jax.weights.engine import Rule, conv, norm, reshape, within

LEVELS = 4
# 1 x 1 convolutions are the linear maps that they are.
POINTWISE = reshape("pointwise", lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
RESNET = [
    *norm("{part:norm1|norm2}", "{part}"),
    *conv("{part:conv1|conv2}", "{part}"),
    *conv("nin_shortcut", "shortcut"),
]


def pointwise(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", POINTWISE), Rule(f"{source}.bias", f"{target}/bias")]


HALF = "{half:encoder|decoder}."
RULES: list[Rule] = [
    *conv(HALF + "{part:conv_in|conv_out}", "{half}/{part}"),
    *norm(HALF + "norm_out", "{half}/norm_out"),
    *within("encoder.down.{n}.block.{i}.", "encoder/stages/{n}/resnets/{i}/", RESNET),
    *conv("encoder.down.{n}.downsample.conv", "encoder/stages/{n}/resample"),
    *within(HALF + "mid.block_1.", "{half}/mid/resnets/0/", RESNET),
    *within(HALF + "mid.block_2.", "{half}/mid/resnets/1/", RESNET),
    *norm(HALF + "mid.attn_1.norm", "{half}/mid/attention/norm"),
    *pointwise(HALF + "mid.attn_1.{part:q|k|v}", "{half}/mid/attention/{part}"),
    *pointwise(HALF + "mid.attn_1.proj_out", "{half}/mid/attention/proj"),
]
for level in range(LEVELS):
    ours = f"decoder/stages/{LEVELS - 1 - level}"
    RULES += within(f"decoder.up.{level}.block.{{i}}.", f"{ours}/resnets/{{i}}/", RESNET)
    RULES += conv(f"decoder.up.{level}.upsample.conv", f"{ours}/resample")


def recognise(shapes, config: dict) -> bool:
    return (
        "decoder.up.3.block.0.conv1.weight" in shapes
        and "decoder.up.4.block.0.conv1.weight" not in shapes
        and len(shapes.get("encoder.conv_in.weight", ())) == 4
        and "quant_conv.weight" not in shapes
    )


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.flux_ae.Config; the file has no config beside it, so the scale is the published one."""
    first = [name for name in shapes if name.startswith("encoder.down.0.block.") and name.endswith(".conv1.weight")]
    return dict(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        block_out_channels=tuple(shapes[f"encoder.down.{n}.block.0.conv1.weight"][0] for n in range(LEVELS)),
        layers_per_block=len(first),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        norm_num_groups=config.get("norm_num_groups", 32),
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=config.get("scale_factor", 0.3611),
        shift_factor=config.get("shift_factor", 0.1159),
    )
