"""VideoGPT's VQ-VAE: Lightning checkpoints of wilson1yan/VideoGPT and folders of Open-Sora-Plan, under the same names."""

from opensora_jax.weights.engine import CONV_TRANSPOSE, LINEAR, Rule, conv, copy, drop, linear, norm

BLOCK, OURS = "{part:encoder|decoder}.res_stack.{i}", "{part}/res_stack/{i}"


def _batch_norm(source: str, ours: str) -> list[Rule]:
    return [
        *norm(source, ours),
        copy(f"{source}.running_mean", f"{ours}/mean"),
        copy(f"{source}.running_var", f"{ours}/var"),
        drop(f"{source}.num_batches_tracked"),
    ]


RULES: list[Rule] = [
    *conv("encoder.convs.{i}.conv", "encoder/convs/{i}"),
    *conv("encoder.conv_last.conv", "encoder/conv_last"),
    Rule("decoder.convts.{i}.convt.weight", "decoder/convts/{i}/kernel", CONV_TRANSPOSE),
    copy("decoder.convts.{i}.convt.bias", "decoder/convts/{i}/bias"),
    *_batch_norm(BLOCK + ".block.0", OURS + "/norm1"),
    *conv(BLOCK + ".block.2.conv", OURS + "/conv1"),
    *_batch_norm(BLOCK + ".block.3", OURS + "/norm2"),
    *conv(BLOCK + ".block.5.conv", OURS + "/conv2"),
    *_batch_norm(BLOCK + ".block.6", OURS + "/norm3"),
    Rule(BLOCK + ".block.8.attn_{axis:w|h|t}.w_{kind:q|k|v}s.weight", OURS + "/attn_{axis}/{kind}/kernel", LINEAR),
    *linear(BLOCK + ".block.8.attn_{axis:w|h|t}.fc", OURS + "/attn_{axis}/out"),
    *_batch_norm(BLOCK, OURS),
    *conv("{which:pre|post}_vq_conv.conv", "{which}_vq_conv"),
    copy("codebook.embeddings", "codebook/embeddings"),
    copy("codebook.N", "codebook/count"),
    copy("codebook.z_avg", "codebook/sum"),
]


def recognise(shapes, config: dict) -> bool:
    return "codebook.z_avg" in shapes and "encoder.convs.0.conv.weight" in shapes


def config_from(shapes, config: dict) -> dict:
    """Arguments of vaes.vqvae.Config. Shapes do not tell how an axis is halved: a config must, else all are halved
    by every convolution."""
    codes, width = shapes["codebook.embeddings"]
    convs = sum(name.startswith("encoder.convs.") and name.endswith(".weight") for name in shapes)
    downsample = config.get("downsample") or (2**convs,) * 3
    if isinstance(downsample, str):
        downsample = map(int, downsample.split(","))
    blocks = {name.split(".")[2] for name in shapes if name.startswith("encoder.res_stack.") and ".block." in name}
    return dict(
        embedding_dim=width,
        n_codes=codes,
        n_hiddens=shapes["encoder.convs.0.conv.weight"][0],
        n_res_layers=len(blocks),
        downsample=tuple(downsample),
    )
