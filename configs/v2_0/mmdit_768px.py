"""Open-Sora 2.0 (11B MMDiT) on 129 frames of 576x1024, text to video, one clip a group of 8 chips.

    python -m opensora_jax.plan --config=configs/v2_0/mmdit_768px.py --topology=v5p:8x8x8

Hardware: 512 chips of v5p. Latents, T5 features (`text_emb`) and CLIP's pooled vectors (`y_vec`) come with the data; captions
are dropped there. Expect: docs/performance.md, section "Plans".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = {"family": "mmdit", "preset": "opensora2_mmdit_11b", "dtype": "bfloat16", "remat": "full"}
    config.vae = {"family": "hunyuan_vae", "dtype": "bfloat16"}
    config.text_encoder = {"family": "t5", "preset": "t5-v1_1-xxl", "dtype": "bfloat16"}
    config.text = {"max_length": 512, "dropout": 0.0}
    config.objective = {"name": "rectified_flow", "preset": "V2_0"}
    config.optimizer = {"learning_rate": 5e-5, "betas": (0.9, 0.999), "eps": 1e-15, "grad_clip": 1.0}
    config.data = {
        "source": "data/train",
        "batch_size": 1,
        "num_frames": 129,
        "height": 576,
        "width": 1024,
        "size_multiple": 16,
    }
    config.mesh = {"data": -1, "fsdp": 8, "context": 8, "rules": "fsdp_context"}
    return config
