"""What Open-Sora 1.3 samples with: text guidance 7.5 that oscillates; `:i2v` for its image and video to video network.

    python -m opensora_jax.sample --config=configs/sample/v1_3.py --from=PIPELINE --prompt="..."
    python -m opensora_jax.sample --config=configs/sample/v1_3.py:i2v --from=PIPELINE --prompt="..." --image=FILE

Hardware: what the pipeline's network needs. Expect: 113 frames of 720p, with i2v of 360p, at 24 frames a second.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.objective = {"name": "rectified_flow", "preset": "V1_3"}
    config.steps, config.guidance, config.oscillate_text = 30, 7.5, True
    config.num_frames, config.fps, config.max_length = 113, 24.0, 300
    if variant == "i2v":
        config.resolution = "360p"
        config.image_guidance, config.oscillate_image, config.image_floor = 5.0, True, 1.0
        config.hold_given_frames, config.condition_frame_length = True, 5
        config.scores = {"version": "1.3", "aes": 7.0}
    else:
        config.resolution, config.guidance_rescale = "720p", 0.7
    return config
