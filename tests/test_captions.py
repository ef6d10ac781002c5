"""Every family of denoisers in a training step: what it reads of a batch, and how its captions are dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import captions
from opensora_jax.common.errors import UserError
from opensora_jax.config import part
from opensora_jax.diffusion import iddpm, rectified_flow
from opensora_jax.system import System

ROWS, LENGTH, WIDTH = 2, 5, 8
TINY = dict(hidden_size=24, depth=2, num_heads=2, mlp_ratio=2.0)
TEXT = TINY | dict(caption_channels=WIDTH, model_max_length=LENGTH)
IMAGE = dict(patch_size=[2, 2], **TINY)
LATTE = dict(hidden_size=24, depth=2, num_heads=2, caption_channels=WIDTH)
MMDIT = dict(
    in_channels=16, vec_in_dim=6, context_in_dim=WIDTH, hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1,
    axes_dim=[4, 4, 4], mlp_ratio=2.0,
)  # fmt: skip
FAMILIES = {  # the network, its objective, and whether an empty prompt's features are its null
    "dit of classes": (dict(family="dit", condition="label_6", **IMAGE), iddpm, False),
    "dit of pooled text": (dict(family="dit", caption_channels=WIDTH, **TINY), iddpm, False),
    "latte of nothing": (dict(family="latte", condition="none", **TINY), iddpm, False),
    "latte of classes": (dict(family="latte", condition="label_6", **TINY), iddpm, False),
    "latte of all tokens": (
        dict(family="latte", condition="flat_text", model_max_length=LENGTH, caption_channels=WIDTH, **TINY), iddpm, True,
    ),
    "latte_t2v": (dict(family="latte_t2v", caption_tokens=LENGTH, **LATTE), iddpm, False),
    "latte_t2v of diffusers": (dict(family="latte_t2v", caption_tokens=0, **LATTE), iddpm, True),
    "latte_t2v of classes": (dict(family="latte_t2v", num_classes=6, **LATTE | {"caption_channels": 0}), iddpm, False),
    "pixart": (dict(family="pixart", micro_condition=True, drop_path=0.1, **TEXT), iddpm, False),
    "pixart of diffusers": (dict(family="pixart", **TEXT | {"model_max_length": 0}), iddpm, True),
    "stdit": (dict(family="stdit", **TEXT), iddpm, False),
    "stdit2": (dict(family="stdit2", **TEXT), iddpm, False),
    "stdit3": (dict(family="stdit3", **TEXT), rectified_flow, False),
    "stdit3 of projected text": (dict(family="stdit3", skip_y_embedder=True, **TEXT), rectified_flow, True),
    "stdit3_v13": (dict(family="stdit3_v13", in_channels=4, **TEXT), rectified_flow, False),
    "mmdit": (dict(family="mmdit", **MMDIT), rectified_flow, True),
    "mmdit of distilled guidance": (dict(family="mmdit", guidance_embed=True, **MMDIT), rectified_flow, True),
}  # fmt: skip


def system_of(name) -> System:
    return System(denoiser=part("models", FAMILIES[name][0], "config.model"))


def batch_of(system) -> dict:
    """What data with latents and text features brings, as device arrays of its shapes."""
    known = system.inputs
    rows = lambda *shape, dtype="float32": jax.ShapeDtypeStruct((ROWS, *shape), dtype)
    y = known.get("y")
    length = y.shape[1] if y is not None and y.shape[1:2] == (1,) else LENGTH
    batch = {"latents": rows(3, 4, 6, 4), "x_mask": rows(3, dtype="bool")}
    batch |= {"text_mask": rows(length, dtype="int32")} | {n: rows() for n in ("fps", "height", "width", "num_frames")}
    if captions.classes(system):
        return batch | {"labels": rows(dtype="int32")}
    return batch | {"text_emb": rows(length, y.shape[-1] if y is not None else WIDTH), "y_vec": rows(6)}


def null_of(batch) -> dict:
    return {
        name: jax.ShapeDtypeStruct((1, *batch[name].shape[1:]), batch[name].dtype)
        for name in captions.FEATURES
        if name in batch
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_loss_and_gradients(name):
    _, objective, null_features = FAMILIES[name]
    system = system_of(name)
    batch = batch_of(system)
    assert captions.wants_null_features(system) == null_features
    frozen = {"null": null_of(batch)} if null_features else {}
    loss_fn = system.diffusion_loss(objective, objective.Config(), 0.5)
    params, key = system.networks["denoiser"].abstract, jax.eval_shape(lambda: jax.random.key(0))
    step = lambda *given: jax.value_and_grad(loss_fn, has_aux=True)(*given)
    (loss, metrics), gradients = jax.eval_shape(step, params, batch, key, frozen)
    assert loss.shape == () and metrics["loss_per_sample"].shape == (ROWS,)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    if null_features:
        with pytest.raises(UserError, match=r"no null caption of its own.*config.pipeline"):
            jax.eval_shape(step, params, batch, key, {})


def dropped(name, frozen, rows=64):
    """What 64 samples of ones become where a third of them is dropped to zeros: [64] of each feature."""
    batch = {"latents": jnp.zeros((rows, 1)), "text_emb": jnp.ones((rows, LENGTH, WIDTH)), "y_vec": jnp.ones((rows, 6))}
    batch["text_mask"] = jnp.ones((rows, LENGTH), jnp.int32)
    out, extra = captions.dropped(system_of(name), batch, frozen, jax.random.key(0), 0.3)
    kept = {key: np.asarray(out[key]).reshape(rows, -1) for key in captions.FEATURES if key in out}
    assert not extra and all((values == values[:, :1]).all() for values in kept.values())
    return {key: values[:, 0] for key, values in kept.items()}


def test_dropped_captions_are_the_empty_prompt():
    """T5's and CLIP's features each by their own draw, whole samples at a time, the mask with its features."""
    null = {"text_emb": jnp.zeros((1, LENGTH, WIDTH)), "y_vec": jnp.zeros((1, 6))}
    null["text_mask"] = jnp.zeros((1, LENGTH), jnp.int32)
    two = dropped("mmdit", {"null": null})
    assert two.keys() == {"text_emb", "y_vec"} and all(0.5 < kept.mean() < 0.9 for kept in two.values())
    assert (two["text_emb"] != two["y_vec"]).any()
    masked = dropped("pixart of diffusers", {"null": null})
    np.testing.assert_array_equal(masked["text_emb"], masked["text_mask"])
    longer = null | {"text_emb": jnp.zeros((1, LENGTH + 1, WIDTH))}
    with pytest.raises(UserError, match=r"config.text.max_length"):
        dropped("mmdit", {"null": longer})


def test_classes_are_captions_that_are_numbers():
    system = system_of("dit of classes")
    np.testing.assert_array_equal(captions.class_numbers(system, ["0", " 5"]), [0, 5])
    for wrong in ("6", "a cat", "-1"):
        with pytest.raises(UserError, match="a number below 6"):
            captions.class_numbers(system, ["1", wrong])
    never = System(denoiser=part("models", FAMILIES["dit of classes"][0] | {"class_dropout_prob": 0.0}, "config.model"))
    with pytest.raises(UserError, match="no null class"):
        captions.dropped(never, {"latents": jnp.zeros((2, 1))}, {}, jax.random.key(0), 0.1)
    assert captions.dropped(never, {"latents": jnp.zeros((2, 1))}, {}, jax.random.key(0), 0.0)[1] == {}
