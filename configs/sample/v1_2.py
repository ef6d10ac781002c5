"""What Open-Sora 1.2 samples with: 30 steps of rectified flow, clips overlapping by five latent frames (17 frames).

    python -m opensora_jax.sample --config=configs/sample/v1_2.py --from=PIPELINE --prompt="..." [--image=FILE] [--loop=4]

Hardware: what the pipeline's network needs. Expect: 51 frames of 240p at 24 frames a second.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.objective = {"name": "rectified_flow", "preset": "V1_2"}
    config.steps, config.guidance = 30, 7.0
    config.num_frames, config.height, config.width, config.fps = 51, 240, 426, 24.0
    config.max_length, config.condition_frame_length = 300, 5
    config.scores = {"aes": 6.5}
    return config
