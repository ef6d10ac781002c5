"""CausalVAE of Open-Sora-Plan 1.0: the subfolder vae/ of LanguageBind/Open-Sora-Plan-v1.0.0 (config.json + weights), or
a Lightning checkpoint, whose `loss.*` (discriminator, LPIPS) is left out."""

from opensora_jax.weights.engine import Rule, conv, copy, drop, norm

SIDE = "{side:encoder|decoder}"
LEVEL, OUR_LEVEL = SIDE + ".{way:down|up}.{level}", "{side}/{way}/{level}"


def _conv(source: str, ours: str) -> list[Rule]:
    """Causal convolutions wrap the one that holds the weights; plain ones are it."""
    return conv(f"{source}.conv", ours) + conv(source, f"{ours}/plain")


def _resnet(source: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm1", f"{ours}/norm1"),
        *_conv(f"{source}.conv1", f"{ours}/conv1"),
        *norm(f"{source}.norm2", f"{ours}/norm2"),
        *_conv(f"{source}.conv2", f"{ours}/conv2"),
        *_conv(f"{source}.nin_shortcut", f"{ours}/shortcut"),
    ]


def _attention(source: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm", f"{ours}/norm"),
        *_conv(source + ".{part:q|k|v|proj_out}", ours + "/{part}"),
    ]


RULES: list[Rule] = [
    *_conv(SIDE + ".{end:conv_in|conv_out}", "{side}/{end}"),
    *norm(SIDE + ".norm_out", "{side}/norm_out"),
    *_resnet(LEVEL + ".block.{i}", OUR_LEVEL + "/block/{i}"),
    *_attention(LEVEL + ".attn.{i}", OUR_LEVEL + "/attn/{i}"),
    *_conv(
        LEVEL + ".{what:downsample|upsample|time_downsample|time_upsample}.conv",
        OUR_LEVEL + "/{what}/conv",
    ),
    copy(LEVEL + ".{what:time_downsample|time_upsample}.mix_factor", OUR_LEVEL + "/{what}/mix_factor"),
    *_resnet(SIDE + ".mid.block_{i}", "{side}/mid/block_{i}"),
    *_attention(SIDE + ".mid.attn_1", "{side}/mid/attn_1"),
    *_conv("{which:quant|post_quant}_conv", "{which}_conv"),
    drop("loss.{rest:.+}"),
]

NAMED = (
    "q_conv", "encoder_conv_in", "encoder_conv_out", "encoder_attention", "encoder_resnet_blocks",
    "encoder_spatial_downsample", "encoder_temporal_downsample", "encoder_mid_resnet", "decoder_conv_in",
    "decoder_conv_out", "decoder_attention", "decoder_resnet_blocks", "decoder_spatial_upsample",
    "decoder_temporal_upsample", "decoder_mid_resnet", "attn_resolutions", "resolution",
)  # fmt: skip


def recognise(shapes, config: dict) -> bool:
    """Told from Stable Diffusion's autoencoder by kernels over time under its (CompVis) names."""
    return len(shapes.get("quant_conv.conv.weight", ())) == 5 and "encoder.down.0.block.0.norm1.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.causal_vae.Config. Shapes do not tell where time is halved: without a config.json, the class's
    defaults are taken (levels 1 and 2; the released weights halve at 0 and 1, which their config.json says)."""
    hidden = (shapes.get("encoder.conv_in.conv.weight") or shapes["encoder.conv_in.weight"])[0]
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
    blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
    widths = [shapes[f"encoder.down.{i}.block.0.norm2.weight"][0] for i in range(levels)]
    moments = next(shapes[name] for name in ("quant_conv.conv.weight", "quant_conv.weight") if name in shapes)
    found = dict(
        hidden_size=hidden,
        hidden_size_mult=tuple(width // hidden for width in widths),
        num_res_blocks=len(blocks),
        z_channels=moments[1] // 2,
        embed_dim=moments[0] // 2,
    )
    freeze = lambda value: tuple(value) if isinstance(value, list) else value
    return found | {key: freeze(config[key]) for key in NAMED if config.get(key) is not None}
