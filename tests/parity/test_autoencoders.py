"""Live: our autoencoders against diffusers' AutoencoderKL, AutoencoderKLHunyuanVideo and AutoencoderDC."""

import jax
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLHunyuanVideo

from opensora_jax.verify.case import channels_first, channels_last
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
        scaling_factor=0.4, encoder_out_shortcut=shuffled, decoder_act_fns=("relu", "silu", "silu"),
    )  # fmt: skip
    net, params = live.ours(model, "vaes", "dc_ae")
    x, z = live.normal(2, 3, 16, 24), live.normal(2, 8, 4, 6)
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(x)).latent * 0.4
        pixels = model.decode(torch.from_numpy(z) / 0.4).sample
    ours_z, ours_x = both_ways(net, params, x[:, :, None], z[:, :, None])
    live.close(channels_first(ours_z)[:, :, 0], latents)
    live.close(channels_first(ours_x)[:, :, 0], pixels)
