"""Fine-tuning of the shipped pipeline on a colour that it has never seen; `make demo` runs it on latents of its own.

    python -m opensora_jax.train --config=configs/demo/finetune.py --workdir=runs/demo/run --export=runs/demo/pipeline

Hardware: 4 minutes on two CPU cores. Expect: orange shapes for orange prompts, the old colours as before.
"""

from ml_collections import ConfigDict

from configs.demo import stdit3


def get_config(variant: str = "") -> ConfigDict:
    """variant "pixels": the clips themselves, for encoding."""
    config = stdit3.get_config()
    config.steps = 500
    config.pipeline = "tiny"
    config.init_from = "tiny"
    config.model = {}  # as the pipeline has it
    config.text_encoder = {}
    config.text.tokenizer = ""
    config.sampling = {}
    config.optimizer = {
        "learning_rate": 5e-4,
        "eps": 1e-8,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_share": 0.1,
    }
    config.ema_decay = 0.98
    config.ema_start_steps = 0
    if variant == "pixels":
        config.data = stdit3.SIZE | {"source": ("runs/demo/orange", "runs/demo/known"), "batch_size": 16}
    else:
        config.data = {"source": "runs/demo/latents", "batch_size": 16}
    config.checkpoint = {"every_steps": 100, "keep": 1}
    config.log = {"every_steps": 1}
    return config
