"""Open-Sora 1.2, stage 3: the best data at every size up to 720p, with image conditioning (1.1B STDiT3).

    python -m opensora_jax.train --config=configs/stage3.py --workdir=runs/stage3 --config.init_from=runs/stage2

Hardware: as stage 1; the largest bucket is 720p x 102 frames. Expect: the original ran 15,000 steps; sample from the run at
any time with `python -m opensora_jax.sample --from=runs/stage3`.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 15_000
    config.data.buckets = {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: (1.0, 27), 204: (1.0, 13), 408: (1.0, 6)},
        "256": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.5), 2)},
        "240p": {1: (1.0, 297), 51: (0.5, 20), 102: (0.5, 10), 204: (0.5, 5), 408: ((0.5, 0.4), 2)},
        "360p": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.3), 1)},
        "512": {1: (1.0, 141), 51: (0.5, 8), 102: (0.5, 4), 204: (0.5, 2), 408: ((0.5, 0.2), 1)},
        "480p": {1: (1.0, 89), 51: (0.5, 5), 102: (0.5, 3), 204: ((0.5, 0.5), 1), 408: (0.0, None)},
        "720p": {1: (0.3, 36), 51: (0.2, 2), 102: (0.1, 1), 204: (0.0, None)},
        "1024": {1: (0.3, 36), 51: (0.1, 2), 102: (0.1, 1), 204: (0.0, None)},
        "1080p": {1: (0.1, 5)},
        "2048": {1: (0.05, 5)},
    }
    config.data.mask_ratios = dict.fromkeys(base.MASKS, 0.002) | {
        "random": 0.01,
        "image_head": 0.22,
        "image_tail": 0.005,
        "image_head_tail": 0.005,
    }
    return config
