"""Sampling through its public entries, four steps of the shipped pipeline."""

import json
import shlex
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from opensora_jax import config, sample
from opensora_jax.common.errors import UserError
from opensora_jax.data.video_io import probe, read_frames
from opensora_jax.pipeline import Pipeline, SamplingConfig
from tests.conftest import REPO

TEXTS = ["a red circle moving left", "a blue square moving up"]


@pytest.fixture(scope="session")
def pipe():
    pipe = Pipeline.from_pretrained("tiny")
    pipe.sampling = replace(pipe.sampling, steps=4)
    return pipe


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


def test_the_command_writes_videos_and_says_how(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    flags = [
        f"--prompt_file={prompts}",
        "--steps=4",
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
    assert Image.open(videos[0].with_suffix(".gif")).size == (192, 192)  # large enough to look at


def test_the_command_goes_on_from_an_image(tmp_path):
    """Two clips of 34 frames that share 17."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "first.png")
    flags = [
        "--prompt=|0|a red circle|1|a blue square",
        f"--image={tmp_path / 'first.png'}",
        "--loop=2",
    ]
    flags += [
        "--num_frames=34",
        "--steps=2",
        "--no-gif",
        f"--out={tmp_path / 'out'}",
        "--config.condition_frame_edit=0.1",
    ]
    assert sample.main(flags) == 0
    (video,) = (tmp_path / "out").glob("*.mp4")
    frames = read_frames(video)
    assert frames.shape == (51, 32, 32, 3)
    made = json.loads(video.with_suffix(".json").read_text())
    assert made["image"].endswith("first.png") and made["loop"] == 2


def test_every_command_of_the_page_is_understood():
    lines = (REPO / "docs" / "sample.md").read_text().splitlines()
    commands = [shlex.split(line)[3:] for line in lines if line.startswith("    python -m opensora_jax.sample")]
    assert len(commands) > 5
    for flags in commands:
        if "[" not in "".join(flags):  # the first line of the page is the grammar
            args, _ = sample.arguments(flags)
            assert args.prompt


def test_settings_of_the_releases_are_settings():
    for name in ("v1_1", "v1_2", "v1_3", "v1_3.py:i2v", "v2_0", "v2_0.py:768px"):
        args, _ = sample.arguments([])
        file = f"configs/sample/{name if ':' in name else name + '.py'}"
        more = sample.with_settings(args, config.load(file, []))
        cfg = config.build(SamplingConfig, more, file)
        assert cfg.objective["preset"].lower() == name[:4] and args.steps
    with pytest.raises(UserError, match="did you mean oscillate_text"):
        sample.with_settings(sample.arguments([])[0], {"oscilate_text": True})


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
