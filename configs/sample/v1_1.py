"""What Open-Sora 1.1 samples with: 100 steps of DDPM, guidance on three of four channels, clips overlapping by 4 frames.

    python -m opensora_jax.sample --config=configs/sample/v1_1.py --from=PIPELINE --prompt="..." [--image=FILE]

Hardware: what the pipeline's network needs. Expect: 16 frames of 240p at 8 frames a second.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.objective = {"name": "iddpm", "preset": "V1_1"}
    config.steps, config.guidance, config.guided_channels = 100, 7.0, 3
    config.num_frames, config.height, config.width, config.fps = 16, 240, 426, 8.0
    config.max_length, config.condition_frame_length = 200, 4
    return config
