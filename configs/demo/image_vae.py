"""The image half of the shipped video VAE: frames of shapes in any colour but orange, 32 x 32 to 8 x 8 x 4.

    python -m opensora_jax.train --config=configs/demo/image_vae.py --workdir=runs/tiny/image_vae

Hardware: 10 minutes on two CPU cores, with XLA_FLAGS=--xla_force_host_platform_device_count=2 as for all of configs/demo (a
device a core; batch_size counts a device's clips). Expect: a loss near 0.018.
"""

from ml_collections import ConfigDict

SPATIAL = {"block_out_channels": (16, 32, 64), "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.9}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "vae"
    config.steps = 2500
    config.vae = {"family": "sd_vae"} | SPATIAL
    config.vae_loss = {"kl_weight": 1e-6, "l2_weight": 4.0, "sample_posterior": False, "calibrate_batches": 0}
    config.optimizer = {"learning_rate": 2e-3, "eps": 1e-8, "warmup_steps": 20, "schedule": "cosine"}
    config.ema_decay = 0.99
    config.data = {
        "source": "shapes:all?count=16384&paint=any&seed=1&size=32&num_frames=1",
        "batch_size": 8,
        "num_frames": 1,
        "height": 32,
        "width": 32,
    }
    config.checkpoint = {"every_steps": 500, "keep": 1}
    config.log = {"every_steps": 50}
    return config
