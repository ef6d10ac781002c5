"""The evaluation from the command line: files in, table and JSON out, mistakes in one sentence."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from opensora_jax.common.errors import UserError
from opensora_jax.data.video_io import write_video
from opensora_jax.evaluate import __main__ as entry
from opensora_jax.evaluate import scores, videos
from opensora_jax.metrics import fvd, psnr
from opensora_jax.models import clip_vision, lpips
from opensora_jax.nn.params import Network
from opensora_jax.text import clip
from opensora_jax.weights import clip as clip_table
from opensora_jax.weights import clip_vision as vision_table
from opensora_jax.weights import engine
from opensora_jax.weights import lpips as lpips_table
from tests.checks import random_params


def reference_weights(module, table, cfg) -> dict[str, np.ndarray]:
    """Random weights under the reference's names."""
    network = Network.of(lambda rngs: module.build(cfg, rngs=rngs))
    flat = {path: np.asarray(leaf) for path, leaf in engine.flatten(random_params(network)).items()}
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    return dict(engine.reference_arrays(shapes, flat.__getitem__, table.RULES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three clips, their originals and prompts."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for side in ("real", "generated"):
        (root / side).mkdir()
    for i in range(3):
        clip_ = np.repeat(np.repeat(rng.integers(0, 256, (12, 8, 10, 3), dtype=np.uint8), 8, 1), 8, 2)
        write_video(root / "real" / f"{i}.mp4", clip_, 8, crf=1)
        write_video(root / "generated" / f"{i}.mp4", np.clip(clip_.astype(int) + 20, 0, 255).astype(np.uint8), 8, crf=1)
    (root / "prompts.txt").write_text("a red ball\na blue box\na green cone\n")
    return root


def flags(folders, *more):
    return [f"--real={folders / 'real'}", f"--generated={folders / 'generated'}", "--num_frames=10", *more]


def test_pixels_are_compared_pair_by_pair(folders, tmp_path, capsys):
    out = tmp_path / "report.json"
    more = (f"--out={out}", "--batch_size=2", "--resolution=48", "--crop=40")
    assert entry.main(flags(folders, *more)) == 0
    report = json.loads(out.read_text())
    assert report["videos"] == 3 and len(report["metrics"]["psnr"]["per_video"]) == 3
    view = videos.View(10, resolution=48, crop=40)
    pair = [videos.stacked(videos.find(folders / side, side), view) for side in ("real", "generated")]
    assert pair[0].shape == (3, 10, 40, 40, 3)
    np.testing.assert_allclose(report["metrics"]["psnr"]["value"], psnr.psnr(*pair).mean(), rtol=1e-6)
    assert 0 < report["metrics"]["ssim"]["value"] < 1
    assert "psnr" in capsys.readouterr().out


def test_lpips_reads_backbone_and_channel_weights_from_two_files(folders, tmp_path):
    whole = reference_weights(lpips, lpips_table, lpips.Config("alex"))
    lins = {name: np.abs(tensor) for name, tensor in whole.items() if name.startswith("lin")}
    backbone = {"features." + name.split(".", 2)[2]: tensor for name, tensor in whole.items() if name not in lins}
    save_file(lins, tmp_path / "lin.safetensors")
    save_file(backbone, tmp_path / "alex.safetensors")
    files = f"--lpips={tmp_path / 'lin.safetensors'},{tmp_path / 'alex.safetensors'}"
    out = tmp_path / "report.json"
    assert entry.main([*flags(folders, "--metrics=lpips", files, f"--out={out}", "--limit=1"), "--num_frames=2"]) == 0
    assert json.loads(out.read_text())["metrics"]["lpips"]["value"] > 0


def test_clip_score_of_videos_and_prompts(folders, tmp_path):
    from opensora_jax.text.tokenizers import train_tokenizer

    vision = clip_vision.Config(
        image_size=16, patch_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        projection_dim=4,
    )  # fmt: skip
    tokenizer = train_tokenizer(["a red ball", "a blue box"], tmp_path / "clip", vocab_size=160)
    text = clip.Config(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=12, projection_dim=4,
    )  # fmt: skip
    weights = reference_weights(clip_vision, vision_table, vision) | reference_weights(clip, clip_table, text)
    save_file(weights | {"logit_scale": np.zeros((), "f4")}, tmp_path / "clip" / "model.safetensors")
    out = tmp_path / "report.json"
    command = [f"--generated={folders / 'generated'}", "--metrics=clip_score", f"--prompts={folders / 'prompts.txt'}"]
    assert entry.main([*command, f"--clip={tmp_path / 'clip'}", "--num_frames=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())["metrics"]["clip_score"]["per_video"]
    assert len(found) == 3 and max(map(abs, found)) <= 1 and len(set(found)) == 3


def test_fvd_gathers_both_sets_before_it_compares(monkeypatch):
    monkeypatch.setattr(fvd, "preprocess", lambda clips, convention: np.asarray(clips))
    clips = np.random.default_rng(1).uniform(size=(5, 11, 16, 16, 3)).astype("f4")
    network = lambda x: np.asarray(x)[:, -1, ::8, ::8].reshape(len(x), -1)
    metric = scores.FVD(network, (10, 11), "styleganv", batch=2)
    for start in (0, 2, 4):
        part = clips[start : start + 2]
        metric.update(part, part[:1] ** 2 if start < 4 else None, [])
    found = metric.result()
    features = fvd.features(network, clips[:, :10]), fvd.features(network, clips[[0, 2], :10] ** 2)
    np.testing.assert_allclose(found["by_length"][10], fvd.frechet_distance(*features), rtol=1e-5)
    np.testing.assert_allclose(found["value"], np.mean(list(found["by_length"].values())))


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--generated=DIR is missing"),
        (["--generated=x", "--metrics=fvd"], "fvd needs --real and --i3d"),
        (["--generated=x", "--real=y", "--metrics=lpips"], "lpips needs --lpips"),
        (["--generated=x", "--real=y", "--metrics=psnr,fdv"], "fdv is unknown; did you mean fvd"),
        (["--generated=x", "--real=x", "--metrics=fvd", "--i3d=f", "--num_frames=4"], "at least 10 frames"),
        (["--generated=nowhere", "--real=x"], "--generated=nowhere is no folder"),
        (["--generated=x", "--batch_size=0"], "--batch_size must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(words, said):
    with pytest.raises(UserError, match=said):
        entry.main(words)


def test_files_that_do_not_fit_are_named(folders, tmp_path):
    long, small, few = ["--num_frames=13"], ["--crop=400"], tmp_path / "few"
    with pytest.raises(UserError, match="has 12 frames, 13 every 1 need 13"):
        entry.main([*flags(folders), *long])
    with pytest.raises(UserError, match="smaller than --crop=400"):
        entry.main([*flags(folders), *small])
    few.mkdir()
    write_video(few / "0.mp4", np.zeros((12, 64, 80, 3), np.uint8), 8)
    with pytest.raises(UserError, match="holds 1 videos and"):
        entry.main([f"--real={few}", f"--generated={folders / 'generated'}"])
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a safetensors file"):
        entry.main(flags(folders, "--metrics=lpips", f"--lpips={tmp_path / 'weights.safetensors'}"))
    save_file({"a": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no i3d checkpoint"):
        entry.main(flags(folders, "--metrics=fvd", f"--i3d={tmp_path / 'other.safetensors'}"))
    with pytest.raises(UserError, match="2 prompts for 3 videos"):
        (tmp_path / "two.txt").write_text("a\nb\n")
        videos.read_prompts(str(tmp_path / "two.txt"), videos.find(folders / "real", "real"))


def test_prompts_by_name(folders, tmp_path):
    paths = videos.find(folders / "real", "real")
    (tmp_path / "p.json").write_text(json.dumps({"2": "c", "0.mp4": "a", "1": "b"}))
    assert videos.read_prompts(str(tmp_path / "p.json"), paths) == ["a", "b", "c"]
    (tmp_path / "p.json").write_text(json.dumps({"2": "c"}))
    with pytest.raises(UserError, match=r"no prompt for 0\.mp4"):
        videos.read_prompts(str(tmp_path / "p.json"), paths)


def test_help_is_quick():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "opensora_jax.evaluate", "--help"], capture_output=True
    )
    assert done.returncode == 0 and b"--real" in done.stdout
    assert b" jax\n" not in done.stderr
    assert time.monotonic() - began < 20  # under 2 s on an idle machine


def test_clip_sees_the_centre():
    frames = np.zeros((1, 20, 40, 3), "f4")
    frames[:, :, 10:30] = 1
    pixels = scores.clip_pixels(frames, 10)
    assert pixels.shape == (1, 10, 10, 3) and pixels.mean() > 0.95
