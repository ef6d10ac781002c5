"""Open-Sora 1.0, STDiT-XL/2 on 64 frames of 512x512, one clip a group of 8 chips; `:whole_clips`: a clip a chip;
`:minute_1080p`: 184 frames of 1088x1920.

    python -m opensora_jax.plan --config=configs/v1_0/stdit.py --topology=v5p:4x4x4
    python -m opensora_jax.train --config=configs/v1_0/stdit.py --workdir=runs/stdit

Hardware: 64 chips of v5p or v6e, under 2 GB each. `:whole_clips` needs 16 GB of them and exchanges no activations: 1.5
times the clips a second on v6e, by estimate. `:minute_1080p` is 1.5 million tokens, for 8 chips of v5p. Train on latents and text
features written by opensora_jax.encode. Expect: figures in docs/performance.md, section "Plans".
"""

from ml_collections import ConfigDict


def get_config(variant: str = "64x512") -> ConfigDict:
    sizes = {"64x512": (64, 512, 512), "whole_clips": (64, 512, 512), "minute_1080p": (184, 1088, 1920)}
    frames, height, width = sizes[variant]
    config = ConfigDict()
    config.model = {"family": "stdit", "preset": "STDiT-XL/2-64x512x512", "dtype": "bfloat16", "remat": "full"}
    config.vae = {"family": "sd_vae", "dtype": "bfloat16"}
    config.text_encoder = {"family": "t5", "preset": "t5-v1_1-xxl", "dtype": "bfloat16"}
    config.text = {"max_length": 120, "dropout": 0.1}
    config.objective = {"name": "iddpm", "preset": "V1_0"}
    config.optimizer = {"learning_rate": 2e-5, "eps": 1e-8, "grad_clip": 1.0}
    config.data = {"source": "data/train", "batch_size": 1, "num_frames": frames, "height": height, "width": width}
    config.mesh = {"data": -1, "fsdp": 4, "context": 8, "rules": "fsdp_context"}
    if variant == "minute_1080p":
        config.mesh.fsdp = 1
    elif variant == "whole_clips":
        config.mesh = {"data": -1, "fsdp": 8, "rules": "fsdp"}
        config.model.remat = "spatial"
    return config
