"""Live: our autoencoders against diffusers' AutoencoderKL, AutoencoderKLHunyuanVideo and AutoencoderDC."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLHunyuanVideo

from opensora_jax.verify.case import channels_first, channels_last, load_network
from tests.parity import live

pytestmark = pytest.mark.parity


def both_ways(net, params, x, z):
    """Our latents (or posterior means) of x and pixels of z, unscaled."""
    run = jax.jit(lambda p, x, z: (net(p, x, method="encode"), net(p, z, method="decode")))
    return run(params, channels_last(x), channels_last(z))


@pytest.mark.parametrize("quantised, latents", [(True, 4), (False, 16)], ids=["stable diffusion", "flux"])
def test_image_vae(quantised, latents):
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=latents,
        use_quant_conv=quantised, use_post_quant_conv=quantised, shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip
    net, params = live.ours(model, "vaes", "sd_vae")
    x, z = live.normal(2, 3, 16, 24), live.normal(2, latents, 4, 6)
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(x)).latent_dist.mean
        pixels = model.decode(torch.from_numpy(z) / 0.3611 + 0.1159).sample
    ours_z, ours_x = both_ways(net, params, x[:, :, None], z[:, :, None])
    live.close(channels_first(ours_z)[:, :, 0], (mean - 0.1159) * 0.3611)
    live.close(channels_first(ours_x)[:, :, 0], pixels)


@pytest.mark.parametrize("frames", [9, 1])
def test_hunyuan_video_vae(frames):
    model = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    net, params = live.ours(model, "vaes", "hunyuan_vae")
    x, z = live.normal(1, 3, frames, 16, 24), live.normal(1, 4, 1 + frames // 4, 2, 3)
    scale = model.config.scaling_factor
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(x)).latent_dist.mean
        pixels = model.decode(torch.from_numpy(z) / scale).sample
    ours_z, ours_x = both_ways(net, params, x, z)
    live.close(channels_first(ours_z), mean * scale)
    live.close(channels_first(ours_x), pixels)


@pytest.mark.parametrize("shuffled", [False, True], ids=["interpolation", "pixel shuffle"])
def test_deep_compression_autoencoder(shuffled):
    blocks = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    model = AutoencoderDC(
        latent_channels=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(16, 32, 64), decoder_block_out_channels=(16, 32, 64),
        encoder_layers_per_block=(1, 1, 2), decoder_layers_per_block=(1, 2, 1),
        encoder_qkv_multiscales=((), (5,), (5,)), decoder_qkv_multiscales=((), (5,), (5,)),
        downsample_block_type="pixel_unshuffle" if shuffled else "conv",
        upsample_block_type="pixel_shuffle" if shuffled else "interpolate",
    )  # fmt: skip
    kinds = (
        {"downsample_block_type": "ConvPixelUnshuffle", "upsample_block_type": "ConvPixelShuffle"} if shuffled else {}
    )
    config = {"encoder": kinds, "decoder": kinds | {"out_act": "relu"}}
    net, params, _ = load_network("vaes", "dc_ae", named_by_mit(live.weights_of(model), shuffled), config)
    x, z = live.normal(2, 3, 16, 24), live.normal(2, 8, 4, 6)
    with torch.no_grad():
        latents, pixels = model.encode(torch.from_numpy(x)).latent, model.decode(torch.from_numpy(z)).sample
    ours_z, ours_x = both_ways(net, params, x[:, :, None], z[:, :, None])
    live.close(channels_first(ours_z)[:, :, 0], latents)
    live.close(channels_first(ours_x)[:, :, 0], pixels)


def named_by_mit(weights: dict[str, np.ndarray], shuffled: bool) -> dict[str, np.ndarray]:
    """diffusers' names of DC-AE as those of its authors: its to_q, to_k and to_v are thirds of one tensor (each head has
    its q, k and v side by side in it), its linear layers were 1 x 1 convolutions."""
    inner = {
        "attn.to_out.": "context_module.main.proj.conv.", "attn.norm_out.": "context_module.main.proj.norm.",
        "conv_out.conv_inverted.": "local_module.main.inverted_conv.conv.",
        "conv_out.conv_depth.": "local_module.main.depth_conv.conv.",
        "conv_out.conv_point.": "local_module.main.point_conv.conv.", "conv_out.norm.": "local_module.main.point_conv.norm.",
        "conv1.": "main.conv1.conv.", "conv2.": "main.conv2.conv.", "norm.": "main.conv2.norm.",
    }  # fmt: skip
    ends = {
        "encoder.conv_in.": "encoder.project_in.conv.", "encoder.conv_out.": "encoder.project_out.main.op_list.0.conv.",
        "decoder.conv_in.": "decoder.project_in.main.conv.", "decoder.norm_out.": "decoder.project_out.op_list.0.",
        "decoder.conv_out.": "decoder.project_out.op_list.2.conv.",
    }  # fmt: skip
    named = {}
    for name, value in weights.items():
        if end := next((end for end in ends if name.startswith(end)), None):
            named[name.replace(end, ends[end])] = value
            continue
        half, _, stage, op, rest = name.split(".", 4)
        place = f"{half}.stages.{stage}.op_list.{op}."
        if rest.startswith("conv."):
            nested = "conv.conv." if shuffled or half == "decoder" else "conv."
            named[place + "main." + rest.replace("conv.", nested)] = value
        elif rest == "attn.to_q.weight":
            qkv = [weights[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            named[place + "context_module.main.qkv.conv.weight"] = np.concatenate(qkv)[:, :, None, None]
        elif "to_qkv_multiscale" in rest:
            index = 0 if "proj_in" in rest else 1
            scale = rest.split(".")[2]
            named[f"{place}context_module.main.aggreg.{scale}.{index}.weight"] = value
        elif "to_k" not in rest and "to_v" not in rest:
            part = next(part for part in inner if rest.startswith(part))
            value = value[:, :, None, None] if part == "attn.to_out." else value
            named[place + rest.replace(part, inner[part], 1)] = value
    return named
