"""What every run of Open-Sora 1.2 shares; the other files change what differs.

Fields and their defaults: opensora_jax/training/run.py and the dataclasses that it names.
"""

from ml_collections import ConfigDict

# Shares of clips that keep some frames as conditions, by kind of mask (stages 1 and 2).
MASKS = {
    "random": 0.05,
    "intepolate": 0.005,
    "quarter_random": 0.005,
    "quarter_head": 0.005,
    "quarter_tail": 0.005,
    "quarter_head_tail": 0.005,
    "image_random": 0.025,
    "image_head": 0.05,
    "image_tail": 0.025,
    "image_head_tail": 0.025,
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.model = {"family": "stdit3", "preset": "STDiT3-XL/2", "dtype": "bfloat16", "remat": "full"}
    # VAE, T5 and tokenizer, converted once: docs/convert.md, section "Open-Sora 1.2".
    config.pipeline = "pretrained/opensora-1.2"
    # The same parts by name, so that --config.dry_run=True needs no weights; their weights are those of the pipeline.
    config.vae = {"family": "video_vae", "preset": "OpenSoraVAE_V1_2", "dtype": "bfloat16"}
    config.text_encoder = {"family": "t5", "preset": "t5-v1_1-xxl", "dtype": "bfloat16"}
    config.text = {"max_length": 300, "dropout": 0.1}
    config.objective = {"name": "rectified_flow", "preset": "V1_2"}
    config.optimizer = {
        "learning_rate": 1e-4,
        "eps": 1e-15,
        "grad_clip": 1.0,
        "warmup_steps": 1000,
        "freeze": ("y_embedder",),
    }
    config.ema_decay = 0.99
    # ArrayRecord shards, of mp4 clips or of latents and text features written by opensora_jax.encode; or a .csv, .parquet.
    config.data = {"source": "data/train", "bucket_version": "1.2", "transform": "resize_crop"}
    config.mesh = {"data": -1, "fsdp": 8, "rules": "fsdp"}
    config.checkpoint = {"every_steps": 200, "keep": 3}
    return config
