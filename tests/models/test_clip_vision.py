"""CLIP's image model: names both ways, presets' sizes, what its features depend on."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.models import clip_vision
from opensora_jax.nn.params import Network
from opensora_jax.weights import clip_vision as table
from tests.checks import check_round_trip, random_params

TINY = clip_vision.Config(
    image_size=12, patch_size=4, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    projection_dim=3,
)  # fmt: skip


def reference_weights() -> dict[str, np.ndarray]:
    """A whole CLIP under transformers' names, its text half a stub."""
    rng = np.random.default_rng(0)
    shapes = {
        "visual_projection.weight": (3, 8),
        "vision_model.embeddings.class_embedding": (8,),
        "vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (10, 8),
        "text_projection.weight": (3, 5),
        "text_model.final_layer_norm.bias": (5,),
        "logit_scale": (),
    }
    for layer in range(2):
        at = f"vision_model.encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}self_attn.{name}.weight": (8, 8), f"{at}self_attn.{name}.bias": (8,)}
        shapes |= {f"{at}mlp.fc1.weight": (12, 8), f"{at}mlp.fc1.bias": (12,)}
        shapes |= {f"{at}mlp.fc2.weight": (8, 12), f"{at}mlp.fc2.bias": (8,)}
        shapes |= {f"{at}layer_norm{i}.{kind}": (8,) for i in (1, 2) for kind in ("weight", "bias")}
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{name}.{kind}": (8,) for kind in ("weight", "bias")}
    return {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def test_names_both_ways_and_a_config_read_from_shapes():
    weights = reference_weights()
    config = {"vision_config": {"num_attention_heads": 2}}
    assert clip_vision.Config(**table.config_from({k: v.shape for k, v in weights.items()}, config)) == TINY
    check_round_trip(weights, "models", "clip_vision", config)


def test_full_sizes():
    count = lambda name: Network.of(lambda rngs: clip_vision.build(clip_vision.PRESETS[name], rngs=rngs)).count()
    # transformers' CLIPVisionModelWithProjection of the same checkpoints
    assert count("clip-vit-base-patch32") == 87_849_216
    assert count("clip-vit-large-patch14") == 303_966_208


def test_every_pixel_reaches_the_features_and_samples_stay_apart():
    net = Network.of(lambda rngs: clip_vision.build(TINY, rngs=rngs))
    params = random_params(net)
    run = jax.jit(lambda x: net(params, x))
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 12, 12, 3)), "float32")
    base, changed = run(x), run(x.at[0, 11, 11, 2].add(0.5))
    assert base.shape == (2, 3)
    assert np.abs(base - changed)[0].max() > 1e-4
    np.testing.assert_array_equal(base[1], changed[1])
