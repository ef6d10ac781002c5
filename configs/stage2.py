"""Open-Sora 1.2, stage 2: more 360p, first 480p and 720p clips (1.1B STDiT3).

    python -m opensora_jax.train --config=configs/stage2.py --workdir=runs/stage2 --config.init_from=runs/stage1

Hardware: as stage 1. Expect: the loss starts where stage 1 ended and falls slowly; the original ran 23,000 steps.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 23_000
    config.optimizer.warmup_steps = 0
    config.data.buckets = {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13), 408: ((1.0, 0.1), 6)},
        "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 1.0), 10), 204: ((0.5, 1.0), 5), 408: ((0.5, 1.0), 2)},
        "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 1.0), 10), 204: ((0.4, 1.0), 5), 408: ((0.4, 1.0), 2)},
        "360p": {1: (0.5, 141), 51: (0.15, 8), 102: ((0.3, 0.5), 4), 204: ((0.3, 1.0), 2), 408: ((0.5, 0.5), 1)},
        "512": {1: (0.4, 141), 51: (0.15, 8), 102: ((0.3, 0.5), 4), 204: ((0.3, 1.0), 2), 408: ((0.5, 0.5), 1)},
        "480p": {1: (0.5, 89), 51: (0.2, 5), 102: (0.2, 2), 204: (0.1, 1)},
        "720p": {1: (0.1, 36), 51: (0.03, 1)},
        "1024": {1: (0.1, 36), 51: (0.02, 1)},
        "1080p": {1: (0.01, 5)},
        "2048": {1: (0.01, 5)},
    }
    config.data.mask_ratios = base.MASKS
    return config
