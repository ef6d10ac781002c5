"""diffusers' AutoencoderKL (config.json + safetensors), with today's attention names or those before diffusers 0.17."""

from opensora_jax.common.errors import UserError
from opensora_jax.weights.engine import Rule, conv, linear, norm, within

RESNET = [
    *norm("norm1", "norm1"),
    *conv("conv1", "conv1"),
    *norm("norm2", "norm2"),
    *conv("conv2", "conv2"),
    *conv("conv_shortcut", "shortcut"),
]
ATTENTION = [
    *norm("group_norm", "norm"),
    *linear("to_q", "q"),
    *linear("to_k", "k"),
    *linear("to_v", "v"),
    *linear("to_out.0", "proj"),
    *linear("query", "q"),
    *linear("key", "k"),
    *linear("value", "v"),
    *linear("proj_attn", "proj"),
]
HALF = "{half:encoder|decoder}."
RULES: list[Rule] = [
    *conv(HALF + "conv_in", "{half}/conv_in"),
    *within("encoder.down_blocks.{n}.resnets.{i}.", "encoder/stages/{n}/resnets/{i}/", RESNET),
    *conv("encoder.down_blocks.{n}.downsamplers.0.conv", "encoder/stages/{n}/resample"),
    *within("decoder.up_blocks.{n}.resnets.{i}.", "decoder/stages/{n}/resnets/{i}/", RESNET),
    *conv("decoder.up_blocks.{n}.upsamplers.0.conv", "decoder/stages/{n}/resample"),
    *within(HALF + "mid_block.resnets.{i}.", "{half}/mid/resnets/{i}/", RESNET),
    *within(HALF + "mid_block.attentions.0.", "{half}/mid/attention/", ATTENTION),
    *norm(HALF + "conv_norm_out", "{half}/norm_out"),
    *conv(HALF + "conv_out", "{half}/conv_out"),
    *conv("quant_conv", "quant_conv"),
    *conv("post_quant_conv", "post_quant_conv"),
]


def recognise(shapes, config: dict) -> bool:
    """Hunyuan's kernels have five axes; Stable Video Diffusion's decoder ends along time."""
    first = shapes.get("encoder.down_blocks.0.resnets.0.conv1.weight", ())
    return len(first) == 4 and "decoder.conv_in.weight" in shapes and "decoder.time_conv_out.weight" not in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.sd_vae.Config, from shapes and, for what they do not tell, from diffusers' config.json."""
    plain = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, only in plain.items():
        if unknown := sorted(set(config.get(key, ())) - {only}):
            raise UserError(f"{key} {', '.join(unknown)} is not served; AutoencoderKL is read with {only} only")
    widths = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in shapes:
        widths.append(shapes[name][0])
    found = dict(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        block_out_channels=tuple(widths),
        layers_per_block=sum(
            name.startswith("encoder.down_blocks.0.") and name.endswith(".conv1.weight") for name in shapes
        ),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        mid_block_attention="encoder.mid_block.attentions.0.group_norm.weight" in shapes,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )
    spoken = ("norm_num_groups", "act_fn", "scaling_factor", "shift_factor")
    return found | {key: config[key] for key in spoken if config.get(key) is not None}
