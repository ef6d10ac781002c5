"""CLIP as plain functions of a dictionary of weights, for scoring: both towers, float32, jitted once a batch size.

Reads a folder as published on the Hub (config.json, model.safetensors, tokenizer files), for example
openai/clip-vit-large-patch14. Radford et al. 2021; parameter names are those of transformers.
"""

import functools
import json
import os
from pathlib import Path

import numpy as np

from opensora_jax.common.errors import UserError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32}
TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "eos_token_id": 49407}
SHARED = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}


def require(path: str, flag: str, what: str) -> None:
    """Refuses before any work when weights are not there: a score is never made up."""
    if not path:
        raise UserError(f"{what} needs weights: give --{flag}=PATH (in a config file: config.STEP.{flag})")
    if not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{what}: --{flag}={path} does not exist; download it first, for example with `hf download`")


class Clip:
    """Images and texts → unit vectors of one space."""

    def __init__(self, folder: str, batch_size: int = 16):
        from safetensors.numpy import load_file

        self.folder, self.batch_size = Path(folder).expanduser(), batch_size
        try:
            config = json.loads((self.folder / "config.json").read_text())
            weights = load_file(self.folder / "model.safetensors")
        except OSError as error:
            raise UserError(f"{folder} is no CLIP folder: {error.filename} is missing") from error
        self.vision = VISION | SHARED | (config.get("vision_config") or {})
        self.text = TEXT | SHARED | (config.get("text_config") or {})
        self.weights = {name: value.astype(np.float32) for name, value in weights.items() if value.dtype.kind == "f"}
        self.logit_scale = float(np.exp(self.weights["logit_scale"]))
        self.tokenizer = None

    def images(self, pictures: list[np.ndarray]) -> np.ndarray:
        """[N, D] unit vectors of RGB pictures of any size."""
        pixels = np.stack([preprocess(picture, self.vision["image_size"]) for picture in pictures])
        weights = {k: v for k, v in self.weights.items() if k.startswith(("vision_model.", "visual_projection."))}
        return self.run(functools.partial(image_features, config=self.vision), weights, pixels)

    def texts(self, sentences: list[str]) -> np.ndarray:
        """[N, D] unit vectors; text beyond 77 tokens is cut off."""
        if self.tokenizer is None:
            from transformers import CLIPTokenizer

            self.tokenizer = CLIPTokenizer.from_pretrained(self.folder)
        length = self.weights["text_model.embeddings.position_embedding.weight"].shape[0]
        ids = self.tokenizer(sentences, padding="max_length", max_length=length, truncation=True)["input_ids"]
        weights = {k: v for k, v in self.weights.items() if k.startswith(("text_model.", "text_projection."))}
        return self.run(functools.partial(text_features, config=self.text), weights, np.asarray(ids, np.int32))

    def run(self, features, weights: dict, inputs: np.ndarray) -> np.ndarray:
        """In batches of one size, so that there is one compilation."""
        import jax

        name = features.func.__name__
        if not hasattr(self, name):
            setattr(self, name, (jax.jit(features), jax.device_put(weights)))
        compiled, placed = getattr(self, name)
        out = []
        for start in range(0, len(inputs), self.batch_size):
            piece = inputs[start : start + self.batch_size]
            padded = np.pad(piece, [(0, self.batch_size - len(piece)), *[(0, 0)] * (inputs.ndim - 1)])
            out.append(np.asarray(compiled(placed, padded))[: len(piece)])
        vectors = np.concatenate(out)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def preprocess(picture: np.ndarray, side: int) -> np.ndarray:
    """Shorter side to `side` (bicubic), the middle square, normalised [H, W, 3]."""
    from PIL import Image

    height, width = picture.shape[:2]
    short = min(height, width)
    size = (side, int(side * height / short)) if width == short else (int(side * width / short), side)
    image = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), np.float32)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return (image[top : top + side, left : left + side] / 255 - MEAN) / STD


def image_features(weights, pixels, config):
    import jax.numpy as jnp

    count, side, patch = pixels.shape[0], config["image_size"] // config["patch_size"], config["patch_size"]
    blocks = pixels.reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 5, 2, 4).reshape(count, side**2, -1)
    kernel = weights["vision_model.embeddings.patch_embedding.weight"]
    tokens = blocks @ kernel.reshape(kernel.shape[0], -1).T
    first = jnp.broadcast_to(weights["vision_model.embeddings.class_embedding"], (count, 1, tokens.shape[-1]))
    tokens = jnp.concatenate([first, tokens], axis=1) + weights["vision_model.embeddings.position_embedding.weight"]
    tokens = norm(weights, "vision_model.pre_layrnorm", tokens, config)  # the name is spelt so in every checkpoint
    tokens = encoder(weights, "vision_model", tokens, config, mask=None)
    pooled = norm(weights, "vision_model.post_layernorm", tokens[:, 0], config)
    return pooled @ weights["visual_projection.weight"].T


def text_features(weights, ids, config):
    return text_states(weights, ids, config)[1] @ weights["text_projection.weight"].T


def text_states(weights, ids, config):
    """(states after the final norm [N, L, C], the state at the end-of-text token [N, C])."""
    import jax.numpy as jnp

    length = ids.shape[1]
    tokens = weights["text_model.embeddings.token_embedding.weight"][ids]
    tokens = tokens + weights["text_model.embeddings.position_embedding.weight"][:length]
    mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -jnp.inf)
    tokens = norm(weights, "text_model.final_layer_norm", encoder(weights, "text_model", tokens, config, mask), config)
    # Checkpoints of 2021 say 2 and mean the largest id, which is the end of text in their vocabulary.
    ends = ids if config["eos_token_id"] == 2 else (ids == config["eos_token_id"]).astype(jnp.int32)
    return tokens, tokens[jnp.arange(len(ids)), jnp.argmax(ends, axis=1)]


def encoder(weights, tower: str, tokens, config, mask):
    import jax
    import jax.numpy as jnp

    if config["hidden_act"] == "quick_gelu":
        activation = lambda x: x * jax.nn.sigmoid(1.702 * x)
    else:
        activation = functools.partial(jax.nn.gelu, approximate=config["hidden_act"] != "gelu")
    heads = config["num_attention_heads"]
    count, length, channels = tokens.shape
    for layer in range(config["num_hidden_layers"]):
        place = f"{tower}.encoder.layers.{layer}"
        h = norm(weights, f"{place}.layer_norm1", tokens, config)
        q, k, v = (
            linear(weights, f"{place}.self_attn.{name}_proj", h).reshape(count, length, heads, -1) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (channels // heads) ** -0.5
        scores = scores if mask is None else scores + mask
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v).reshape(count, length, channels)
        tokens = tokens + linear(weights, f"{place}.self_attn.out_proj", mixed)
        h = norm(weights, f"{place}.layer_norm2", tokens, config)
        h = activation(linear(weights, f"{place}.mlp.fc1", h))
        tokens = tokens + linear(weights, f"{place}.mlp.fc2", h)
    return tokens


def linear(weights, name: str, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights, name: str, x, config):
    import jax.numpy as jnp

    mean = x.mean(axis=-1, keepdims=True)
    spread = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(spread + config["layer_norm_eps"]) * weights[f"{name}.weight"] + weights[
        f"{name}.bias"
    ]
