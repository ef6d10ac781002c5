"""DiT-XL/2 with full attention over 819,200 tokens: 200 frames of 1024x1024, one clip on 8 chips.

    python -m opensora_jax.plan --config=configs/v1_0/dit_long.py --topology=v5p:2x2x2

Hardware: 8 chips of v5p. Expect: what the original's slides show for 8 GPUs, here by the compiler's count
(docs/performance.md, section "Plans").
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = {"family": "dit", "preset": "DiT-XL/2", "dtype": "bfloat16", "remat": "full"}
    config.vae = {"family": "sd_vae", "dtype": "bfloat16"}
    config.text_encoder = {"family": "t5", "preset": "t5-v1_1-xxl", "dtype": "bfloat16"}
    config.text = {"max_length": 1, "dropout": 0.1}  # one pooled vector
    config.objective = {"name": "iddpm", "preset": "V1_0"}
    config.optimizer = {"learning_rate": 2e-5, "eps": 1e-8, "grad_clip": 1.0}
    config.data = {"source": "data/train", "batch_size": 1, "num_frames": 200, "height": 1024, "width": 1024}
    config.mesh = {"data": -1, "context": 8, "rules": "fsdp_context"}
    return config
