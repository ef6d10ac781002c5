"""Open-Sora 1.2's VAE: hpcai-tech/OpenSora-VAE-v1.2 (config.json + safetensors)."""

from opensora_jax.weights import sd_vae
from opensora_jax.weights.engine import Rule, conv, norm, reshape, within

PER_CHANNEL = reshape("per_channel", lambda a: a.reshape(-1), lambda a: a.reshape(1, -1, 1, 1, 1))
SPATIAL = "spatial_vae.module."
RESNET = [
    *norm("norm1", "norm1"),
    *conv("conv1.conv", "conv1"),
    *norm("norm2", "norm2"),
    *conv("conv2.conv", "conv2"),
    *conv("conv3.conv", "shortcut"),
]
HALF = "{half:encoder|decoder}."
TEMPORAL = [
    *within(HALF + "block_res_blocks.{n}.{i}.", "{half}/stages/{n}/{i}/", RESNET),
    *within(HALF + "res_blocks.{i}.", "{half}/resnets/{i}/", RESNET),
    *norm(HALF + "norm1", "{half}/norm_out"),
    *conv("encoder.conv_in.conv", "encoder/conv_in"),
    *conv("encoder.conv_blocks.{n}.conv", "encoder/down/{n}"),
    *conv("encoder.conv2.conv", "encoder/conv_out"),
    *conv("decoder.conv1.conv", "decoder/conv_in"),
    *conv("decoder.conv_blocks.{n}.conv", "decoder/up/{n}"),
    *conv("decoder.conv_out.conv", "decoder/conv_out"),
    *conv("quant_conv.conv", "quant_conv"),
    *conv("post_quant_conv.conv", "post_quant_conv"),
]
RULES: list[Rule] = [
    *within(SPATIAL, "spatial/", sd_vae.RULES),
    *within("temporal_vae.", "temporal/", TEMPORAL),
    Rule("shift", "shift", PER_CHANNEL),
    Rule("scale", "scale", PER_CHANNEL),
]


def recognise(shapes, config: dict) -> bool:
    return "temporal_vae.encoder.conv_in.conv.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.video_vae.Config. The image VAE's own configuration may lie under vae_2d; its scaling factor
    there is ignored, as Open-Sora ignores it (0.18215 even for SDXL's VAE)."""
    vae_2d = config.get("vae_2d") or {}
    kl = vae_2d.get("autoencoder_kl") or config.get("vae_2d_autoencoder_kl") or {}
    spatial_shapes = {name.removeprefix(SPATIAL): shape for name, shape in shapes.items() if name.startswith(SPATIAL)}
    spatial = sd_vae.config_from(spatial_shapes, {key: kl[key] for key in kl if key not in ("scaling_factor",)})
    spatial["micro_batch_size"] = vae_2d.get("micro_batch_size", 4)
    temporal = config.get("vae_temporal")
    temporal = temporal if isinstance(temporal, dict) else {}

    filters, channels = shapes["temporal_vae.encoder.conv_in.conv.weight"][:2]
    stages = []
    while (name := f"temporal_vae.encoder.block_res_blocks.{len(stages)}.0.conv1.conv.weight") in shapes:
        stages.append(shapes[name][0] // filters)
    found = dict(
        spatial=spatial,
        in_out_channels=channels,
        latent_embed_dim=shapes["temporal_vae.post_quant_conv.conv.weight"][0],
        embed_dim=shapes["temporal_vae.post_quant_conv.conv.weight"][1],
        filters=filters,
        num_res_blocks=sum(
            name.startswith("temporal_vae.encoder.res_blocks.") and name.endswith("conv1.conv.weight")
            for name in shapes
        ),
        channel_multipliers=tuple(stages),
        temporal_downsample=tuple(
            f"temporal_vae.encoder.conv_blocks.{n}.conv.weight" in shapes for n in range(len(stages) - 1)
        ),
    )
    found |= {key: temporal[key] for key in ("num_groups", "activation_fn") if key in temporal}
    found |= {key: tuple(config[key]) for key in ("shift", "scale") if config.get(key) is not None}
    return found | ({"micro_frame_size": config["micro_frame_size"]} if "micro_frame_size" in config else {})
