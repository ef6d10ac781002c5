"""diffusers' AutoencoderKLTemporalDecoder (the vae folder of Stable Video Diffusion)."""

from opensora_jax.weights import sd_vae
from opensora_jax.weights.engine import Rule, conv, copy, norm, within

BLOCK = [
    *within("spatial_res_block.", "space/", sd_vae.RESNET),
    *within("temporal_res_block.", "time/", sd_vae.RESNET),
    copy("time_mixer.mix_factor", "mix"),
]
RULES: list[Rule] = [
    *(rule for rule in sd_vae.RULES if rule.source.startswith("encoder.")),
    *conv("{half:encoder|decoder}.conv_in", "{half}/conv_in"),
    *within("encoder.mid_block.resnets.{i}.", "encoder/mid/resnets/{i}/", sd_vae.RESNET),
    *within("encoder.mid_block.attentions.0.", "encoder/mid/attention/", sd_vae.ATTENTION),
    *within("decoder.mid_block.resnets.{i}.", "decoder/mid/{i}/", BLOCK),
    *within("decoder.mid_block.attentions.0.", "decoder/attention/", sd_vae.ATTENTION),
    *within("decoder.up_blocks.{n}.resnets.{i}.", "decoder/stages/{n}/resnets/{i}/", BLOCK),
    *conv("decoder.up_blocks.{n}.upsamplers.0.conv", "decoder/stages/{n}/resample"),
    *norm("{half:encoder|decoder}.conv_norm_out", "{half}/norm_out"),
    *conv("{half:encoder|decoder}.conv_out", "{half}/conv_out"),
    *conv("decoder.time_conv_out", "decoder/time_conv_out"),
    *conv("quant_conv", "quant_conv"),
]


def recognise(shapes, config: dict) -> bool:
    return "decoder.time_conv_out.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.svd_vae.Config, from shapes; the scaling factor is config.json's."""
    found = sd_vae.config_from(shapes, config)
    kept = ("in_channels", "block_out_channels", "layers_per_block", "latent_channels", "scaling_factor")
    return {key: found[key] for key in kept if key in found} | {
        "out_channels": shapes["decoder.time_conv_out.weight"][0]
    }
