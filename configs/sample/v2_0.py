"""What Open-Sora 2.0 samples with: 50 steps, text guidance 7.5 and image guidance 3, both oscillating; `:768px`.

    python -m opensora_jax.sample --config=configs/sample/v2_0.py --from=PIPELINE --prompt="..." [--image=FILE]

Hardware: what the pipeline's network needs. Expect: 129 frames at 24 frames a second, 80 forwards of the network for
text, 110 for images (docs/sample.md).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "256px") -> ConfigDict:
    config = ConfigDict()
    config.objective = {"name": "rectified_flow", "preset": "V2_0"}
    config.steps, config.guidance, config.image_guidance = 50, 7.5, 3.0
    config.oscillate_text = config.oscillate_image = True
    config.image_floor = 1.0
    config.num_frames, config.fps, config.max_length, config.clean_caption = 129, 24.0, 512, False
    config.height, config.width = {"256px": (192, 336), "768px": (576, 1024)}[variant]
    config.scores = {"version": "2.0", "fps": 24, "flow": 4}
    return config
