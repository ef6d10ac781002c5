"""Options that no recording has, live: diffusers' autoencoders, transformers' T5 and CLIP, against ours in float32."""

import jax
import numpy as np
import pytest

from opensora_jax.verify.case import load_network

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def randomised(model):
    """Every parameter drawn, also those that begin at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else 0.7 * parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval(), {name: array.numpy() for name, array in model.state_dict().items()}


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=2e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize(
    "options",
    [
        dict(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, latent_channels=3),
        dict(block_out_channels=(8,), norm_num_groups=2, mid_block_add_attention=False, act_fn="gelu"),
        dict(block_out_channels=(8, 8, 16), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.3,
             norm_num_groups=8, scaling_factor=0.5, in_channels=1, out_channels=2),
    ],
)  # fmt: skip
def test_autoencoder_kl(options):
    diffusers = pytest.importorskip("diffusers")
    stages = len(options["block_out_channels"])
    theirs, weights = randomised(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages, **options
        )
    )
    net, params, cfg = load_network("vaes", "sd_vae", weights, dict(theirs.config))
    x = np.random.default_rng(0).normal(size=(2, 8, 12, cfg.in_channels)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(x.transpose(0, 3, 1, 2))).latent_dist.mean
        decoded = theirs.decode(mean).sample
    z = (mean - (options.get("shift_factor") or 0.0)) * options.get("scaling_factor", 0.18215)
    ours = jax.jit(lambda p, x: net(p, x[None], method="encode"))(params, x)[0]
    close(ours, z.permute(0, 2, 3, 1).numpy())
    close(jax.jit(lambda p, z: net(p, z[None], method="decode"))(params, ours)[0], decoded.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_autoencoder_kl_temporal_decoder(layers):
    diffusers = pytest.importorskip("diffusers")
    theirs, weights = randomised(
        diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 64), layers_per_block=layers
        )
    )
    net, params, cfg = load_network("vaes", "svd_vae", weights, dict(theirs.config))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 3)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(x.reshape(6, 4, 6, 3).transpose(0, 3, 1, 2))).latent_dist.mean
        decoded = theirs.decode(mean, num_frames=3).sample
    ours = jax.jit(lambda p, x: net(p, x, method="encode"))(params, x)
    close(ours, (mean * 0.18215).permute(0, 2, 3, 1).reshape(ours.shape).numpy())
    frames = jax.jit(lambda p, z: net(p, z, method="decode"))(params, ours)
    close(frames, decoded.permute(0, 2, 3, 1).reshape(frames.shape).numpy())


@pytest.mark.parametrize("act", ["relu", "gated-silu", "gated-gelu", "gelu"])
def test_t5(act):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj=act, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=20,
    )  # fmt: skip
    theirs, weights = randomised(transformers.T5EncoderModel(config))
    net, params, _ = load_network("text", "t5", weights, config.to_dict())
    ids = np.random.default_rng(0).integers(0, 30, (2, 40))
    mask = (np.arange(40) < np.array([[40], [25]])).astype(np.int64)
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    close(jax.jit(lambda p: net(p, ids, mask))(params), out)


def test_clip_with_projection():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, hidden_act="gelu", projection_dim=6, eos_token_id=29, bos_token_id=28,
    )  # fmt: skip
    theirs, weights = randomised(transformers.CLIPTextModelWithProjection(config))
    net, params, _ = load_network("text", "clip", weights, config.to_dict())
    ids = np.random.default_rng(0).integers(0, 28, (2, 10))
    ids[0, 4:], ids[1, 9] = 29, 29
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids))
    ours = jax.jit(lambda p: net(p, ids))(params)
    close(ours.tokens, out.last_hidden_state.numpy())
    close(ours.projected, out.text_embeds.numpy())
