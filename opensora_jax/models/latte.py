"""Latte (Ma et al. 2024), as released by Vchitect and as Open-Sora 1.0 ported it: DiT whose blocks look at space and
time in turn, conditioned on nothing, a class, or text. LatteT2V, with cross-attention to text, is models/latte_t2v.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.models import dit
from opensora_jax.models.dit import SIZES, DiT
from opensora_jax.nn.blocks import STREAM
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import run_stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain


@dataclass(frozen=True)
class Config(dit.Config):
    """condition: "none", "label_K", "text" (one pooled vector), or "flat_text": all tokens of CLIP side by side through
    one projection, which the last layer does not see (Vchitect's `extras=78`)."""

    model_max_length: int = 77  # tokens of flat_text

    conditions = ("none", "text", "flat_text")

    def __post_init__(self):
        super().__post_init__()
        if self.no_temporal_pos_emb:
            raise UserError("latte: no_temporal_pos_emb is DiT's; Latte's temporal blocks need positions in time")


FLAT_TEXT = dict(condition="flat_text", caption_channels=768)
PRESETS = {
    "Latte-XL/2": Config(),
    "Latte-XL/2x2": Config(patch_size=(2, 2, 2)),
    "Latte-XL/2-class": Config(condition="label_101"),
    "Latte-XL/2-ucf101": Config(patch_size=(2, 2), condition="label_101"),
    "Latte-XL/2-text": Config(patch_size=(2, 2), **FLAT_TEXT),
    **{
        f"Latte-{s}/{p}-unconditional": Config(patch_size=(p, p), condition="none", **SIZES[s])
        for s in SIZES
        for p in (2, 4, 8)
    },
}
REPOSITORIES = {
    "Latte-XL/2-ucf101": "maxin-cn/Latte/ucf101.pt",
    "Latte-XL/2-unconditional": "maxin-cn/Latte/skytimelapse.pt",
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "Latte":
    return Latte(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = dit.inputs(cfg, shape)
    if cfg.condition == "flat_text":
        arrays["y"] = jax.ShapeDtypeStruct((shape.batch, cfg.model_max_length, cfg.caption_channels), "float32")
    return {name: array for name, array in arrays.items() if name != "y" or cfg.condition != "none"}


class Latte(DiT):
    def _y_embedder(self, kwargs):
        cfg = self.cfg
        if cfg.condition == "none":
            return None
        if cfg.condition == "flat_text":
            return Linear(cfg.model_max_length * cfg.caption_channels, cfg.hidden_size, (None, "embed"), **kwargs)
        return super()._y_embedder(kwargs)

    def _conditions(self, t_vec, y, drop):
        if self.y_embedder is None:
            return t_vec, t_vec
        if self.cfg.condition != "flat_text":
            return super()._conditions(t_vec, y, drop)
        if drop is not None:  # no learned null: an empty caption is the text encoder's business
            raise ValueError("latte: flat_text has no null caption; give the embedding of the empty prompt instead")
        y = self.y_embedder(jax.nn.silu(y.astype(self.cfg.dtype).reshape(y.shape[0], -1)))
        return t_vec + tap("y_emb", y), t_vec

    def _run(self, tokens, condition):
        cfg = self.cfg
        tokens = tap("tokens", constrain(tokens, *STREAM))
        positions = self._frame_positions(tokens.shape[1])

        def pair(h, entry):
            blocks, first = entry
            spatial, temporal = (jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in (0, 1))
            h = tap("spatial_out", spatial(h, condition))
            return tap("temporal_out", temporal(h + positions * first, condition, mode="temporal"))

        pairs = cfg.depth // 2
        joined = jax.tree.map(lambda leaf: leaf[: 2 * pairs].reshape(pairs, 2, *leaf.shape[1:]), self.blocks)
        tokens = run_stack(pair, tokens, (joined, jnp.arange(pairs) == 0), remat=cfg.remat) if pairs else tokens
        if cfg.depth % 2:  # Open-Sora's port allows an odd number, which ends on a spatial block
            tokens = jax.tree.map(lambda leaf: leaf[-1], self.blocks)(tokens, condition)
        return tokens
