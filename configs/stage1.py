"""Open-Sora 1.2, stage 1: many short clips and images, mostly 144p to 360p (1.1B STDiT3).

    python -m opensora_jax.train --config=configs/stage1.py --workdir=runs/stage1

Hardware: the bucket table fills 80 GB a device (H100, v5p); `--config.dry_run=True` says what another mesh needs. Start from
PixArt-Sigma with --config.init_from=FOLDER. Expect: the original ran 30,000 steps.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.steps = 30_000
    # {resolution: {frames: (share kept, batch size)}}; (share kept, share tried at this length) where there are two.
    config.data.buckets = {
        "144p": {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13), 408: ((1.0, 0.1), 6)},
        "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 0.1), 5), 408: ((0.5, 0.1), 2)},
        "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 0.1), 5), 408: ((0.4, 0.1), 2)},
        "360p": {1: (0.2, 141), 51: (0.15, 8), 102: ((0.15, 0.33), 4), 204: ((0.15, 0.1), 2), 408: ((0.15, 0.1), 1)},
        "512": {1: (0.1, 141)},
        "480p": {1: (0.1, 89)},
        "720p": {1: (0.05, 36)},
        "1024": {1: (0.05, 36)},
        "1080p": {1: (0.1, 5)},
        "2048": {1: (0.1, 5)},
    }
    config.data.mask_ratios = base.MASKS
    return config
