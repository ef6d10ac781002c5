"""Open-Sora 2.0, stage 1 with images: 256px clips of which stills are given at either end (MMDiT, 11B).

    python -m opensora_jax.train --config=configs/v2_0/stage1_i2v.py --workdir=runs/i2v --config.init_from=runs/stage1

Hardware: 8 accelerators of 140 GB, or more smaller ones. Every sample draws a condition by the weights of conditions.kinds;
stills are encoded by themselves, so the data must be pixels. Sample with `--config=configs/sample/v2_0.py --image=FILE`.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 13_000
    config.model = {"family": "mmdit", "preset": "opensora2_mmdit_11b", "dtype": "bfloat16", "remat": "full"}
    config.pipeline = "pretrained/opensora-2.0"
    config.vae = {"family": "hunyuan_vae", "preset": "hunyuan_vae", "dtype": "bfloat16"}
    config.text_encoder_2 = {"family": "clip", "preset": "clip-vit-large-patch14", "dtype": "bfloat16"}
    config.text = {"max_length": 512, "dropout": 0.1**0.5}  # of T5 and of CLIP, each by a draw of its own
    config.objective = {"name": "rectified_flow", "preset": "V2_0"}
    config.optimizer.freeze = ()
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-5, 0
    config.data.bucket_version, config.data.fps_max = "2.0", 24
    sizes = {5: 12, 37: 6, 69: 4, 101: 3}  # the first length of each group of eight, four frames apart: clips a batch
    config.data.buckets = {
        "256px": {1: (1.0, 45)}
        | {n: (1.0, clips) for first, clips in sizes.items() for n in range(first, first + 32, 4)},
        "768px": {1: (0.5, 13)},
        "1024px": {1: (0.5, 7)},
    }
    config.conditions = {"kinds": {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 1.0}}
    return config
