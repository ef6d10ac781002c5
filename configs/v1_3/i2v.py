"""Open-Sora 1.3, from text to video towards images and videos to videos (STDiT3 with condition embedders, 1.2B).

    python -m opensora_jax.train --config=configs/v1_3/i2v.py --workdir=runs/i2v --config.init_from=pretrained/opensora-1.3

Hardware: 8 accelerators of 80 GB or more. One condition a batch is drawn by the weights of data.mask_types; text, given
frames or both are dropped by those of conditions.drop. Sample with `--config=configs/sample/v1_3.py:i2v`.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 20_000
    config.model = {"family": "stdit3_v13", "preset": "STDiT3-XL/2-v1.3", "dtype": "bfloat16", "remat": "full"}
    config.pipeline = "pretrained/opensora-1.3"
    config.vae = {"family": "video_vae_v13", "preset": "OpenSoraVAE_V1_3", "dtype": "bfloat16"}
    config.objective = {"name": "rectified_flow", "preset": "V1_3"}
    config.optimizer.freeze = ()
    config.data.bucket_version = "1.3"
    config.data.buckets = {
        "360p": {49: (1.0, 10), 65: (1.0, 7), 81: (1.0, 6), 97: (1.0, 5), 113: (1.0, 4)},
        "720p": {49: (0.25, 2), 65: (0.25, 1), 81: (0.25, 1), 97: (0.25, 1), 113: (0.25, 1)},
    }
    config.data.mask_types = {
        "i2v_head": 5, "i2v_tail": 2, "i2v_loop": 2, "v2v_head": 1, "v2v_head_noisy": 2, "v2v_tail": 1, "other": 1,
        "none": 2,
    }  # fmt: skip
    config.conditions = {"drop": {"cond": 0.05, "text": 0.05, "null": 0.05, "keep": 0.85}}
    return config
