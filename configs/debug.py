"""A whole run in a minute on any machine: tiny STDiT3, VAE and T5 with random weights, on procedural clips.

    python -m opensora_jax.train --config=configs/debug.py --workdir=runs/debug

Hardware: one CPU core. Expect: 20 steps in seconds after compiling, a checkpoint every 10, samples of noise at the end.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.steps = 20
    config.model = {
        "family": "stdit3",
        "input_sq_size": 32,
        "hidden_size": 48,
        "depth": 2,
        "num_heads": 4,
        "caption_channels": 32,
        "model_max_length": 16,
    }
    config.vae = {
        "family": "video_vae",
        "weights": "random",
        "spatial": {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "filters": 8,
        "num_res_blocks": 1,
        "channel_multipliers": (1, 2, 2),
        "temporal_downsample": (True, True),
        "num_groups": 4,
        "shift": (0.0, 0.0, 0.0, 0.0),
        "scale": (1.0, 1.0, 1.0, 1.0),
    }
    config.text_encoder = {
        "family": "t5",
        "weights": "random",
        "vocab_size": 256,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
    }
    config.text = {"tokenizer": "tiny", "max_length": 16, "dropout": 0.1}
    config.sampling = {"num_frames": 17, "height": 32, "width": 32, "fps": 8.0, "steps": 4, "max_length": 16}
    config.optimizer = {"learning_rate": 1e-3, "warmup_steps": 5}
    config.ema_decay = 0.9
    config.data = {
        "source": "shapes:train?count=64&size=32",
        "batch_size": 8,
        "num_frames": 17,
        "height": 32,
        "width": 32,
    }
    config.precision = "float32"
    config.checkpoint = {"every_steps": 10, "keep": 3}
    config.log = {
        "every_steps": 5,
        "sample_every_steps": 20,
        "sample_prompts": ("a red circle moving left on a dark background",),
    }
    return config
