"""What a denoiser is told in words, in training: features of captions or class numbers, and what stands for none.

For classifier-free guidance a share of the captions is dropped. A network with a null caption or class of its own takes
that; for the others (Open-Sora 2.0, networks that diffusers stripped of it) the encoders' output for an empty prompt
takes the caption's place, T5's and CLIP's each by a draw of its own, as 2.0 was trained.
"""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError

FEATURES = ("text_emb", "text_mask", "y_vec")


def classes(system) -> int:
    """How many classes the denoiser tells apart; 0: it takes none."""
    known = system.inputs
    numbers = known.get("labels") or known.get("y")
    takes = numbers is not None and jnp.issubdtype(numbers.dtype, jnp.integer)
    return system.denoiser.config.num_classes if takes else 0


def class_numbers(system, texts) -> np.ndarray:
    """Captions of a network of classes are their numbers."""
    count = classes(system)
    wrong = next((text for text in texts if not (text.strip().isdigit() and int(text) < count)), None)
    if wrong is not None:
        raise UserError(f"this network takes classes: a caption must be a number below {count}, got {wrong[:40]!r}")
    return np.array([int(text) for text in texts], np.int32)


def wants_null_features(system) -> bool:
    """Is the null the encoders' output for an empty prompt?"""
    y = system.inputs.get("y")
    return y is not None and not jnp.issubdtype(y.dtype, jnp.integer) and not system.learned_null


def dropped(system, batch: dict, frozen: dict, key, rate: float) -> tuple[dict, dict]:
    """The batch with a share of its captions replaced, and further arguments of the denoiser."""
    known = system.inputs
    rows = batch["latents"].shape[0]
    draw = lambda number: jax.random.bernoulli(jax.random.fold_in(key, number), rate, (rows,))
    if not rate or not {"y", "labels"} & set(known):
        return batch, {}
    extra = {}
    if classes(system):
        droppable = system.networks["denoiser"].abstract
        table = next(droppable[name] for name in ("label_embedder", "y_embedder") if name in droppable)
        if table["table"]["embedding"].shape[0] == classes(system):
            raise UserError("this network has no null class to drop to: set config.text.dropout=0")
        extra["drop_label" if "labels" in known else "drop_text"] = draw(1)
    if wants_null_features(system):
        unread = {name for name in ("text_mask", "y_vec") if name in batch and name not in known}
        batch = _with_null({name: batch[name] for name in batch if name not in unread}, frozen.get("null"), draw)
    elif "drop_text" not in extra and "y" in known:
        extra["drop_text"] = jax.random.bernoulli(key, rate, (rows,))
    return batch, extra


def _with_null(batch: dict, null: dict | None, draw) -> dict:
    wanted = [name for name in FEATURES if name in batch]
    if null is None or not set(wanted) <= set(null):
        lacking = " and ".join(name for name in wanted if name not in (null or {}))
        raise UserError(
            f"this network has no null caption of its own, and without its text encoders there is no {lacking} of an empty "
            "prompt: name config.pipeline, or set config.text.dropout=0"
        )
    out = dict(batch)
    for name in wanted:
        value, other = batch[name], null[name]
        if value.shape[1:] != other.shape[1:]:
            raise UserError(
                f"{name} of the data is {list(value.shape[1:])}, that of an empty prompt {list(other.shape[1:])}: "
                "config.text.max_length must be the length that the data was encoded with"
            )
        chosen = draw(2 if name == "y_vec" else 1).reshape(-1, *[1] * (value.ndim - 1))
        out[name] = jnp.where(chosen, other.astype(value.dtype), value)
    return out
