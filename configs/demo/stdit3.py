"""The denoiser of the shipped pipeline, on latents that `encode` wrote with this same file.

    python -m opensora_jax.encode --config=configs/demo/stdit3.py:pixels --out=runs/tiny/latents
    python -m opensora_jax.train  --config=configs/demo/stdit3.py --workdir=runs/tiny/stdit3 --export=runs/tiny/pipeline

Hardware: 4 and 50 minutes on two CPU cores, a device each. Expect: a loss near 0.1, and clips that show what their captions say
(the shipped one did after 3,500 steps). The text encoder keeps its random weights: a caption of ten known words needs no more,
and what the words mean is learned in the denoiser's cross-attention.
"""

from ml_collections import ConfigDict

SIZE = {"num_frames": 17, "height": 32, "width": 32}


def get_config(variant: str = "") -> ConfigDict:
    """variant "pixels": the clips themselves, for encoding."""
    config = ConfigDict()
    config.steps = 6000
    config.pipeline = "runs/tiny/vae_pipeline"
    config.model = {
        "family": "stdit3",
        "input_sq_size": 32,
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "caption_channels": 64,
        "model_max_length": 16,
    }
    config.text_encoder = {
        "family": "t5",
        "weights": "random",
        "vocab_size": 101,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
    }
    config.text = {"tokenizer": "tiny", "max_length": 16, "dropout": 0.1}
    # Time is shifted by size against 32 x 32, not 512 x 512.
    shift = {"frames": "chunks", "base_area": 32 * 32}
    config.objective = {"name": "rectified_flow", "time": {"method": "logit-normal", "shift": shift}}
    config.sampling = SIZE | {"fps": 8.0, "steps": 30, "guidance_scale": 2.0, "max_length": 16}
    config.optimizer = {"name": "muon", "learning_rate": 3e-3, "eps": 1e-8, "warmup_steps": 200, "schedule": "cosine"}
    config.ema_decay = 0.999
    config.ema_start_steps = 200
    if variant == "pixels":
        config.data = SIZE | {"source": "shapes:train?count=12288&seed=2&size=32", "batch_size": 32}
    else:
        config.data = {"source": "runs/tiny/latents", "batch_size": 16}
    config.checkpoint = {"every_steps": 500, "keep": 1}
    config.log = {"every_steps": 100}
    return config
