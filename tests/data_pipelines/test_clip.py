"""CLIP towers and the stages on them: the text tower on recorded activations, both live against torch (parity)."""

import itertools
import json
import string

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines import pipeline, synthetic
from data_pipelines.clip import SHARED, Clip, preprocess, text_features, text_states
from data_pipelines.decode import frames_at
from data_pipelines.pipeline import Options
from opensora_jax.common.errors import UserError
from tests.data_pipelines.steps import step

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
VISION |= {"intermediate_size": 64}
TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
TEXT |= {"vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 2}
WIDTH = 16


def names(tower, sizes, extra):
    channels, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = dict(extra)
    for layer in range(sizes["num_hidden_layers"]):
        place = f"{tower}.encoder.layers.{layer}"
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{place}.{part}.weight": (channels,), f"{place}.{part}.bias": (channels,)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{place}.self_attn.{part}.weight": (channels, channels),
                f"{place}.self_attn.{part}.bias": (channels,),
            }
        shapes |= {f"{place}.mlp.fc1.weight": (hidden, channels), f"{place}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"{place}.mlp.fc2.weight": (channels, hidden), f"{place}.mlp.fc2.bias": (channels,)}
    return shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP with random weights, as a folder of the Hub has it."""
    path = tmp_path_factory.mktemp("clip")
    c, t = VISION["hidden_size"], TEXT["hidden_size"]
    shapes = {"logit_scale": (), "visual_projection.weight": (WIDTH, c), "text_projection.weight": (WIDTH, t)}
    v = "vision_model"
    shapes |= names(
        v, VISION, {f"{v}.embeddings.class_embedding": (c,), f"{v}.embeddings.patch_embedding.weight": (c, 3, 7, 7)}
    )
    shapes |= {f"{v}.embeddings.position_embedding.weight": (17, c)}
    shapes |= {f"{v}.{n}.{k}": (c,) for n in ("pre_layrnorm", "post_layernorm") for k in ("weight", "bias")}
    shapes |= names("text_model", TEXT, {"text_model.embeddings.token_embedding.weight": (64, t)})
    shapes |= {"text_model.embeddings.position_embedding.weight": (12, t)}
    shapes |= {f"text_model.final_layer_norm.{k}": (t,) for k in ("weight", "bias")}
    rng = np.random.default_rng(0)
    weights = {n: np.asarray(rng.normal(0, 0.3, s), np.float32) for n, s in shapes.items()}
    save_file(weights, path / "model.safetensors")
    config = {"model_type": "clip", "projection_dim": WIDTH, "vision_config": VISION, "text_config": TEXT}
    (path / "config.json").write_text(json.dumps(config))
    head, sizes = {}, (WIDTH, 8, 6, 5, 4, 1)
    for k, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes)):
        head |= {
            f"layers.{k}.weight": rng.normal(size=(b, a)).astype(np.float32),
            f"layers.{k}.bias": np.ones(b, np.float32),
        }
    save_file(head, path / "head.safetensors")
    write_tokenizer(path)
    return path


def write_tokenizer(path):
    """A vocabulary of letters: words are spelt. The end of text has the largest id, as in CLIP's own."""
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)} | {"<|startoftext|>": 62, "<|endoftext|>": 63}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")


def test_text_tower_on_recorded_activations(goldens):
    case = goldens / "clip_text_tiny"
    if not case.is_dir():
        pytest.skip("no recorded activations")
    facts = json.loads((case / "case.json").read_text())
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    states, pooled = text_states(
        load_file(case / "weights.safetensors"), inputs["r0/input_ids"], SHARED | facts["config"]
    )
    for name, ours in (("last_hidden_state", states), ("pooler_output", pooled)):
        theirs, bound = outputs[f"r0/{name}"], facts["outputs"][f"r0/{name}"]["tolerance"]
        error = np.asarray(ours) - theirs
        assert np.abs(error).max() <= bound["max_abs"]
        assert np.linalg.norm(error) <= bound["rel_l2"] * np.linalg.norm(theirs)


def test_stages_score_by_the_weights_alone(folder, tmp_path):
    synthetic.plain(str(tmp_path / "v"), 3)
    paths = [str(p) for p in sorted((tmp_path / "v").iterdir())]
    table = pa.table({"id": list("abc"), "path": paths, "num_frames": [24] * 3})
    plan = step("aesthetic", clip_path=str(folder), aes_path=str(folder / "head.safetensors"))
    made = pipeline.run([plan], table, Options(str(tmp_path / "o"), quiet=True))
    clip = Clip(str(folder))
    from data_pipelines.aesthetic import STAGE

    vectors = clip.images(list(frames_at(paths[1], [2, 12, 21], longer=640)))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert made["aes"][1].as_py() == pytest.approx(STAGE(plan.config).score(vectors).mean(), abs=1e-4)
    assert np.allclose(made["clip_embedding"][1].as_py(), vectors.mean(axis=0), atol=1e-3)
    assert len(set(made["aes"].to_pylist())) == 3


def test_match_is_the_logit_of_caption_and_middle_frame(folder, tmp_path):
    synthetic.plain(str(tmp_path / "v"), 3)
    paths = [*(str(p) for p in sorted((tmp_path / "v").iterdir())), str(tmp_path / "gone.mp4")]
    texts = ["a hill", "two cats on a very long mat", None, "nothing"]
    table = pa.table({"id": list("abcd"), "path": paths, "num_frames": [24] * 4, "text": texts})
    output = Options(str(tmp_path / "o"), quiet=True)
    made = {
        r["id"]: r["match"] for r in pipeline.run([step("match", clip_path=str(folder))], table, output).to_pylist()
    }
    assert made.keys() == set("abc") and made["c"] is None, "no caption, no score; a lost file is an error of its row"
    rejected = pq.read_table(tmp_path / "o" / "rejected" / "00_match.parquet").to_pylist()
    assert [row["id"] for row in rejected] == ["d"] and "gone.mp4" in rejected[0]["error"]
    clip = Clip(str(folder))
    weights = {name: value for name, value in clip.weights.items() if name.startswith("text")}
    spelt = {"a": [62, 26, 7, 8, 11, 37, 63, 63, 63, 63, 63, 63], "b": [62, 19, 22, 40, 2, 0, 19, 44, 14, 39, 26, 63]}
    for name, ids in spelt.items():
        text = np.asarray(text_features(weights, np.array([ids]), clip.text))[0]
        image = clip.images(list(frames_at(paths["ab".index(name)], [12], longer=640)))[0]
        cosine = text @ image / np.linalg.norm(text)
        assert made[name] == pytest.approx(clip.logit_scale * cosine, abs=1e-4)


@pytest.mark.parametrize("stage, flag", [("aesthetic", "clip_path"), ("match", "clip_path")])
def test_without_weights_the_stage_refuses_and_names_the_flag(stage, flag, tmp_path):
    table = pa.table({"id": ["a"], "path": ["x"], "num_frames": [1], "text": ["t"]})
    with pytest.raises(UserError, match=f"needs weights: give --{flag}=PATH"):
        pipeline.run([step(stage)], table, Options(str(tmp_path), quiet=True))
    with pytest.raises(UserError, match=f"--{flag}=/nowhere does not exist"):
        pipeline.run([step(stage, **{flag: "/nowhere"})], table, Options(str(tmp_path), quiet=True))
    assert not (tmp_path / "meta").exists()


def test_preprocessing_keeps_the_middle():
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[:, 20:80] = 255
    out = preprocess(picture, 30)
    assert out.shape == (30, 30, 3) and np.allclose(
        out[:, 3:-3],
        (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / [0.26862954, 0.26130258, 0.27577711],
        atol=1e-4,
    )
