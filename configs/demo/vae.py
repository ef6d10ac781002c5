"""The video VAE of the shipped pipeline: shapes in any colour but orange, 17 frames of 32 x 32 to 5 x 8 x 8 x 4.

    python -m opensora_jax.train --config=configs/demo/image_vae.py --workdir=runs/tiny/image_vae
    python -m opensora_jax.train --config=configs/demo/vae.py --workdir=runs/tiny/vae --export=runs/tiny/vae_pipeline --export_dtype=float32

Hardware: 10 minutes on two CPU cores. Expect: latents near 0.04, 98% of reconstructions show what the clip shows.
"""

from ml_collections import ConfigDict

from configs.demo.image_vae import SPATIAL


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "vae"
    config.steps = 1500
    config.init_from = "runs/tiny/image_vae"
    config.init_into = "spatial"
    config.vae = {
        "family": "video_vae",
        "spatial": SPATIAL,
        "filters": 16,
        "num_res_blocks": 1,
        "channel_multipliers": (1, 2, 2),
        "temporal_downsample": (True, True),
        "num_groups": 1,
        "shift": (0.0, 0.0, 0.0, 0.0),
        "scale": (1.0, 1.0, 1.0, 1.0),
    }
    # The image half stands still, and the temporal half learns to give its latents back: the reference's first stage.
    config.vae_loss = {
        "kl_weight": 1e-6,
        "latent_weight": 1.0,
        "pixel_weight": 0.0,
        "sample_posterior": False,
        "calibrate_batches": 32,
    }
    config.optimizer = {
        "name": "muon",
        "learning_rate": 3e-3,
        "eps": 1e-8,
        "warmup_steps": 50,
        "schedule": "cosine",
        "freeze": ("^spatial/",),
    }
    config.ema_decay = 0.995
    config.data = {
        "source": "shapes:all?count=16384&paint=any&seed=1&size=32",
        "batch_size": 4,
        "height": 32,
        "width": 32,
    }
    config.checkpoint = {"every_steps": 250, "keep": 1}
    config.log = {"every_steps": 50}
    return config
