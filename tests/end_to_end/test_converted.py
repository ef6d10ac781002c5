"""A converted checkpoint is a starting point like any other: convert, two steps on own clips, export, sample."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np

from opensora_jax import config, convert, train
from opensora_jax.parallel.shard import draw
from opensora_jax.pipeline import Pipeline, assemble, write_json
from opensora_jax.training.run import RunConfig


def test_convert_train_export_sample(goldens, own_clips, tmp_path):
    case = goldens / "v12_rflow_sample_a"
    model = json.loads((case / "case.json").read_text())["config"]["model"]
    source = tmp_path / "released"
    source.mkdir()
    shutil.copy(case / "weights.safetensors", source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(model))

    # The converted denoiser beside a VAE and a text encoder of the debug configuration that fit it.
    tree = config.read_file("configs/debug.py")
    tree["text_encoder"] |= {"d_model": model["caption_channels"], "d_kv": 6}
    tree["text"]["max_length"] = tree["sampling"]["max_length"] = model["model_max_length"]
    tree["model"] = {"family": "stdit3"}
    assembly = assemble(config.build(RunConfig, tree, "config"))
    nets = {name: assembly.system.networks[name] for name in ("vae", "text_encoder")}
    params = {name: draw(net, jax.random.key(0)) for name, net in nets.items()}
    folder = tmp_path / "pipeline"

    parts = replace(assembly.system, denoiser=None)
    Pipeline(parts, params, assembly.sampling, assembly.tokenizer).save_pretrained(folder)
    assert convert.main([f"--from={source}", f"--to={folder / 'denoiser'}"]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    index["parts"]["denoiser"] = "stdit3"
    write_json(folder / "model_index.json", index)

    flags = [
        "--config=configs/debug.py", f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'tuned'}",
        f"--config.pipeline={folder}", f"--config.init_from={folder}", "--config.model=None", "--config.vae=None",
        "--config.text_encoder=None", "--config.text.tokenizer=", f"--config.text.max_length={model['model_max_length']}",
        "--config.steps=2", "--config.data.batch_size=1", "--config.log.sample_every_steps=0",
        "--config.log.tensorboard=False", "--export_dtype=float32",
        f"--config.data.source={own_clips / 'clips.csv'}",
    ]  # fmt: skip
    assert train.main(flags) == 0
    before, after = Pipeline.from_pretrained(str(folder)), Pipeline.from_pretrained(str(tmp_path / "tuned"))
    old, new = (jax.tree.leaves(p.params["denoiser"]) for p in (before, after))
    moved = [float(np.abs(a - b).max()) for a, b in zip(old, new)]
    assert 0 < max(moved) < 0.1
    assert after("a red circle").frames.shape == (1, 17, 32, 32, 3)
