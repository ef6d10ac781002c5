"""Sampling through its public entries, on a pipeline of the debug configuration with random weights."""

import json

import jax
import numpy as np
import pytest

from opensora_jax import config, sample
from opensora_jax.common.errors import UserError
from opensora_jax.data.video_io import probe
from opensora_jax.pipeline import Pipeline, assemble
from opensora_jax.training.run import RunConfig

TEXTS = ["a red circle moving left", "a blue square moving up"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    cfg = config.build(RunConfig, config.read_file("configs/debug.py"), "config")
    assembly = assemble(cfg)
    params = {name: jax.jit(net.init)(jax.random.key(7)) for name, net in assembly.system.networks.items()}
    target = tmp_path_factory.mktemp("pipeline") / "debug"
    Pipeline(assembly.system, params, assembly.sampling, assembly.tokenizer).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def pipe(folder):
    return Pipeline.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def both(pipe):
    return pipe(TEXTS, seed=3)


def test_shape_and_type(both):
    assert both.frames.shape == (2, 17, 32, 32, 3) and both.frames.dtype == np.uint8
    assert np.isfinite(both.latents).all()


def test_a_sample_depends_on_its_prompt_and_seed_alone(pipe, both):
    swapped = pipe.generate(TEXTS[::-1], [3, 3])
    np.testing.assert_allclose(swapped.latents[::-1], both.latents, atol=2e-4)
    assert np.abs(pipe.generate(TEXTS, [3, 4]).latents[1] - both.latents[1]).max() > 0.1


def test_negative_prompt_and_guidance_matter(pipe, both):
    assert np.abs(pipe(TEXTS, seed=3, negative_prompt="a green triangle").latents - both.latents).max() > 1e-4
    assert np.abs(pipe(TEXTS, seed=3, guidance_scale=1.0).latents - both.latents).max() > 1e-4


def test_saving_and_loading_changes_nothing(pipe, both, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = Pipeline.from_pretrained(str(tmp_path / "copy"))
    for name, params in pipe.params.items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), params, again.params[name])
        assert all(jax.tree.leaves(same)), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 31}, "nearest: 32x32"),
        ({"num_frames": 0}, "at least 1"),
        ({"stepz": 3}, "unknown sampling settings: stepz"),
    ],
)
def test_settings_that_do_not_fit(pipe, settings, message):
    with pytest.raises(UserError, match=message):
        pipe(TEXTS[0], **settings)


def test_the_command_writes_videos_and_says_how(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    flags = [
        f"--from={folder}",
        f"--prompt_file={prompts}",
        "--seed=3",
        f"--out={tmp_path / 'out'}",
        "--mesh=data=2,fsdp=4",
    ]
    assert sample.main(flags) == 0
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(videos) == 2 and (tmp_path / "out" / "sheet.png").exists()
    info = probe(videos[0])
    assert (info.num_frames, info.height, info.width) == (17, 32, 32)
    made = json.loads(videos[0].with_suffix(".json").read_text())
    assert made["prompt"] == TEXTS[0] and made["seed"] == 3 and made["steps"] == 4
    assert videos[0].with_suffix(".gif").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no prompt"),
        (["--prompt="], "prompt is empty"),
        (["--prompt_file=/none.txt"], "No such file"),
        (["--prompt=a", "--from=/none"], "does not exist"),
        (["--prompt=a", "--resolution=240p", "--height=32"], "exclude each other"),
        (["--prompt=a", "--resolution=241q"], "unknown resolution"),
        (["--prompt=a", "--outt=x"], "is not a flag"),
        (["--prompt=a", "--out=/proc/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        sample.main(flags)
    assert "\n" not in str(caught.value)


def test_an_empty_line_in_a_prompt_file_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na dog\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        sample.main([f"--prompt_file={path}"])


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download someone/something"):
        Pipeline.from_pretrained("someone/something")
