"""Open-Sora 1.3's VAE: hpcai-tech/OpenSora-VAE-v1.3 (config.json + safetensors)."""

from opensora_jax.weights.engine import Rule, conv, norm, reshape, within

# A 1 x 1 x 1 convolution [O, I, 1, 1, 1] is our linear kernel [I, O].
POINTWISE = reshape("pointwise", lambda a: a[:, :, 0, 0, 0].T, lambda a: a.T[:, :, None, None, None])


def pointwise(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", POINTWISE), Rule(f"{source}.bias", f"{target}/bias")]


RESNET = [
    *norm("norm1", "norm1"),
    *conv("conv1.conv", "conv1"),
    *norm("norm2", "norm2"),
    *conv("conv2.conv", "conv2"),
    *conv("nin_shortcut.conv", "shortcut"),
]
ATTENTION = [
    *norm("norm", "norm"),
    *pointwise("q.conv", "q"),
    *pointwise("k.conv", "k"),
    *pointwise("v.conv", "v"),
    *pointwise("proj_out.conv", "proj"),
]
HALF = "{half:encoder|decoder}."
UP = "decoder.up.{n}.upsample."
RULES: list[Rule] = [
    *conv(HALF + "conv_in.conv", "{half}/conv_in"),
    *within("encoder.down.{n}.block.{i}.", "encoder/levels/{n}/resnets/{i}/", RESNET),
    *within("decoder.up.{n}.block.{i}.", "decoder/levels/{n}/resnets/{i}/", RESNET),
    *within(HALF + "mid.block_{i}.", "{half}/mid/block_{i}/", RESNET),
    *within(HALF + "mid.attn_1.", "{half}/mid/attn_1/", ATTENTION),
    *norm(HALF + "norm_out", "{half}/norm_out"),
    *conv("encoder.conv_out.conv", "encoder/conv_out"),
    *conv("decoder.conv_out", "decoder/conv_out"),
    *conv("encoder.down.{n}.downsample.conv", "encoder/levels/{n}/resample/flat"),
    *conv("encoder.down.{n}.downsample.conv.conv", "encoder/levels/{n}/resample/causal"),
    *conv(UP + "conv", "decoder/levels/{n}/resample/conv"),
    *conv(UP + "conv3d.{conv:conv1|conv2}.conv", "decoder/levels/{n}/resample/{conv}"),
    *norm(UP + "conv3d.{norm:norm1|norm2}", "decoder/levels/{n}/resample/{norm}"),
]


def recognise(shapes, config: dict) -> bool:
    """Its relatives (Open-Sora-Plan's VAE) have no residual block in the temporal upsampling."""
    return any(".upsample.conv3d.conv1.conv.weight" in name for name in shapes)


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.video_vae_v13.Config. What is no network (micro clips, normalisation) is the caller's choice,
    in the reference too; config.json speaks of it only where a key is there."""
    found = dict(
        in_channels=shapes["encoder.conv_in.conv.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        z_channels=shapes["decoder.conv_in.conv.weight"][1],
        ch=shapes["encoder.conv_in.conv.weight"][0],
        encoder=_half(shapes, "encoder.down.{n}.block.{i}.", "encoder.down.{n}.downsample.conv.conv.weight", 0, config),
        decoder=_half(
            shapes, "decoder.up.{n}.block.{i}.", "decoder.up.{n}.upsample.conv3d.conv1.conv.weight", 1, config
        ),
    )
    spoken = ("micro_batch_size", "micro_frame_size", "temporal_overlap", "normalization")
    halves = {key: value for half in ("encoder", "decoder") for key, value in (config.get(half) or {}).items()}
    found |= {key: halves[key] for key in ("temporal_downsample", "resamp_with_conv") if key in halves}
    return found | {key: config[key] for key in spoken if key in config}


def _half(shapes, block: str, in_time: str, extra: int, config: dict) -> dict:
    name = block + "conv1.conv.weight"
    widths = []
    while (first := name.format(n=len(widths), i=0)) in shapes:
        widths.append(shapes[first][0])
    blocks = 0
    while name.format(n=0, i=blocks) in shapes:
        blocks += 1
    time_levels = [n for n in range(len(widths)) if in_time.format(n=n) in shapes]
    if not extra and (config.get("encoder") or {}).get("resamp_with_conv") is False:  # pooling leaves no trace
        time_levels = config["encoder"]["down_sampling_layer"]
    return dict(widths=tuple(widths), num_res_blocks=blocks - extra, time_levels=tuple(time_levels))
