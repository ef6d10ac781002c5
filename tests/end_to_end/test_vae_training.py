"""VAE training with a perceptual term, from weights that convert wrote."""

import jax
import numpy as np

from opensora_jax import train
from opensora_jax.config import part
from opensora_jax.training.metrics import read_jsonl
from opensora_jax.weights import store
from opensora_jax.weights.engine import flatten


def test_an_image_vae_trains_with_lpips_and_exports(tmp_path):
    lpips = part("models", {"family": "lpips", "net": "alex"}, "lpips")
    params = jax.jit(lpips.network().init)(jax.random.key(0))
    store.save_params(tmp_path / "lpips", flatten(jax.tree.map(lambda p: np.abs(p) * 0.1, params)), lpips.describe())
    flags = [
        "--config=configs/demo/image_vae.py", f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'vae'}",
        "--config.steps=2", "--config.data.source=shapes:all?count=32&size=64&num_frames=1", "--config.data.batch_size=1",
        "--config.data.height=64", "--config.data.width=64", "--config.log.every_steps=1", "--config.log.tensorboard=False",
        f"--config.vae_loss.perceptual_weights={tmp_path / 'lpips'}", "--config.data.allow_starving=True",
    ]  # fmt: skip
    assert train.main(flags) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(row["perceptual"]) and row["perceptual"] > 0 for row in rows)
    assert (tmp_path / "vae" / "vae" / "model.safetensors").exists()
