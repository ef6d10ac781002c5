"""VAE training with a perceptual term, from weights that convert wrote."""

import jax
import numpy as np
from safetensors.numpy import load_file

from opensora_jax import train
from opensora_jax.config import part
from opensora_jax.parallel.shard import draw
from opensora_jax.training.metrics import read_jsonl
from opensora_jax.weights import store
from opensora_jax.weights.engine import flatten

SMALL = [f"{name}={value}" for name, value in {"block_out_channels": (8, 8), "norm_num_groups": 2}.items()]


def test_an_image_vae_trains_with_lpips_and_exports(tmp_path):
    lpips = part("models", {"family": "lpips", "net": "alex"}, "lpips")
    params = draw(lpips.network(), jax.random.key(0))
    store.save_params(tmp_path / "lpips", flatten(jax.tree.map(lambda p: np.abs(p) * 0.1, params)), lpips.describe())
    flags = [
        "--config=configs/demo/image_vae.py", f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'vae'}",
        "--config.steps=2", "--config.data.source=shapes:all?count=32&size=64&num_frames=1", "--config.data.batch_size=1",
        "--config.data.height=64", "--config.data.width=64", "--config.log.every_steps=1", "--config.log.tensorboard=False",
        f"--config.vae_loss.perceptual_weights={tmp_path / 'lpips'}", "--config.data.allow_starving=True",
        *(f"--config.vae.{field}" for field in SMALL),
    ]  # fmt: skip
    assert train.main(flags) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(row["perceptual"]) and row["perceptual"] > 0 for row in rows)
    assert (tmp_path / "vae" / "vae" / "model.safetensors").exists()


def test_the_temporal_half_learns_alone_from_the_latents_of_an_image_vae(tmp_path):
    """1.2's first stage: nothing but the temporal VAE moves, and the loss is on the image latents."""
    common = [
        "--config.data.height=16", "--config.data.width=16", "--config.data.batch_size=1", "--config.log.every_steps=1",
        "--config.log.tensorboard=False", "--config.data.allow_starving=True", "--export_dtype=float32",
    ]  # fmt: skip
    image = [
        "--config=configs/demo/image_vae.py", f"--workdir={tmp_path / 'image'}", f"--export={tmp_path / 'image_vae'}",
        "--config.data.source=shapes:all?count=16&size=16&num_frames=1", "--config.steps=1",
        *(f"--config.vae.{field}" for field in SMALL),
    ]  # fmt: skip
    video = [
        "--config=configs/demo/vae.py", f"--workdir={tmp_path / 'video'}", f"--export={tmp_path / 'video_vae'}",
        "--config.data.source=shapes:all?count=16&size=16", "--config.steps=2", f"--config.init_from={tmp_path / 'image'}",
        "--config.vae_loss.calibrate_batches=1", "--config.vae.filters=8",
        *(f"--config.vae.spatial.{field}" for field in SMALL),
    ]  # fmt: skip
    assert train.main([*image, *common]) == 0
    assert train.main([*video, *common]) == 0

    rows = read_jsonl(tmp_path / "video" / "metrics.jsonl")
    assert all(row["latents"] > 0 and "l1" not in row for row in rows)
    before, after = (load_file(tmp_path / name / "vae" / "model.safetensors") for name in ("image_vae", "video_vae"))
    for name, kernel in before.items():
        np.testing.assert_array_equal(kernel, after[f"spatial/{name}"], err_msg=name)
    assert any(name.startswith("temporal/") for name in after)
