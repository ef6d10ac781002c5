"""Visual conditions: which frames a network is given, as it wants to be told.

Open-Sora 2.0 concatenates a mask channel (1 = given) and the given latents; its kinds are in `KINDS`. Stills are
encoded on their own, never cut from the video's latents: those have seen later frames. Open-Sora 1.3 adds the given
frames through embedders and, in training, drops text, frames, or both, one draw a batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError

# kind -> frames of the reference (0: a still) given at the head, at the tail
KINDS = {
    "t2v": (None, None),
    "i2v_head": (0, None),
    "i2v_tail": (None, 0),
    "i2v_loop": (0, 0),
    "v2v_head": (32, None),
    "v2v_tail": (None, 32),
    "v2v_head_easy": (64, None),
    "v2v_tail_easy": (None, 64),
}


def given_frames(kind: str, *, causal: bool = True, time: int = 4) -> tuple[int, int]:
    """Latent frames given at the head and at the tail; a causal autoencoder sees one frame more (33, 65)."""
    if kind not in KINDS:
        raise UserError(f"unknown condition {kind!r}; choose one of {', '.join(KINDS)}")
    count = lambda frames: 0 if frames is None else 1 if frames == 0 else frames // time + causal
    head, tail = KINDS[kind]
    return count(head), count(tail)


def place(shape: tuple[int, ...], kind: str, references: list, *, causal: bool = True):
    """Mask [B, T, H, W, 1] and given latents [B, T, H, W, C] for sampling.

    references: for each sample None or a list of latents [T', H, W, C], the first for the head, the last for the tail.
    A still image (T = 1) and a sample without a reference are given nothing.
    """
    head, tail = given_frames(kind, causal=causal)
    mask, latents = np.zeros((*shape[:-1], 1), np.float32), np.zeros(shape, np.float32)
    for b, parts in enumerate(references):
        if parts is None or shape[1] == 1:
            continue
        if head:
            _check(parts[0], head, shape, kind)
            mask[b, :head], latents[b, :head] = 1, np.asarray(parts[0][:head])
        if tail:
            last = parts[-1] if kind.startswith("i2v") else parts[0]  # of several videos the first counts
            _check(last, tail, shape, kind)
            mask[b, -tail:], latents[b, -tail:] = 1, np.asarray(last[-tail:])
    return jnp.asarray(mask), jnp.asarray(latents)


def _check(reference, frames: int, shape, kind: str):
    if len(reference) < frames or shape[1] < frames:
        raise UserError(
            f"condition {kind} needs {frames} latent frames, the reference has {len(reference)} and the clip {shape[1]}"
        )


def put_back(x, kind: str, references: list):
    """After i2v sampling the given latent frames take the place of the generated ones, in every sample."""
    if not kind.startswith("i2v"):
        return x
    x, (head, tail) = jnp.asarray(x), given_frames(kind)
    for b, parts in enumerate(references):
        if parts is not None and head:
            x = x.at[b, 0].set(jnp.asarray(parts[0][0], x.dtype))
        if parts is not None and tail:
            x = x.at[b, -1].set(jnp.asarray(parts[-1][-1], x.dtype))
    return x


@dataclass(frozen=True)
class TrainingConditions:
    """Kinds and their weights, one drawn for every sample. `pad`: repeats stills for a non-causal autoencoder.
    `skip_stills`: the loss leaves out stills that are given."""

    weights: tuple[tuple[str, float], ...] = (("t2v", 1.0), ("i2v_head", 5.0), ("i2v_loop", 1.0), ("i2v_tail", 1.0))
    causal: bool = True
    time: int = 4
    pad: bool = False
    skip_stills: bool = False

    def __post_init__(self):
        for kind, weight in self.weights:
            given_frames(kind)
            if weight < 0:
                raise UserError(f"condition {kind} has the weight {weight}; it must not be negative")

    def usable(self, latent_frames: int) -> tuple[tuple[str, float], ...]:
        """Without the video conditions that would give the whole clip away."""
        fits = lambda kind: (
            kind[:3] != "v2v" or latent_frames > max(given_frames(kind, causal=self.causal, time=self.time))
        )
        return tuple((kind, weight) for kind, weight in self.weights if fits(kind)) or (("t2v", 1.0),)

    def draw(self, key, batch: int, latent_frames: int):
        """Indices [B] into usable(latent_frames)."""
        weights = jnp.array([w for _, w in self.usable(latent_frames)])
        return jax.random.categorical(key, jnp.log(weights), shape=(batch,))


def _padded(kind: str, frames: int, pad: int):
    """Which frame of the clip stands at each place once stills are repeated to fill a latent frame."""
    clip = np.arange(frames)
    if kind == "i2v_head":
        return np.concatenate([np.zeros(pad, int), clip[:-pad]])
    if kind == "i2v_tail":
        return np.concatenate([clip[pad:], np.full(pad, frames - 1)])
    if kind == "i2v_loop":
        return np.concatenate([np.zeros(pad, int), clip[: -2 * pad], np.full(pad, frames - 2 * pad - 1)])
    return clip


def encode_with_conditions(video, encode, kinds, cfg: TrainingConditions, latent_frames: int):
    """Latents [B, T', H', W', C] and conditions [B, T', H', W', 1 + C] of a training batch.

    video [B, T, H, W, 3]; encode: video -> latents; kinds [B]: indices into cfg.usable(latent_frames). Works under jit:
    every usable kind's references are encoded once, each sample takes its own. Quirk kept: with `pad`, the tail still
    is the frame 2·(time - 1) before the last also for i2v_tail, whose clip ends with the last.
    """
    frames, pad = video.shape[1], (cfg.time - 1) * (cfg.pad and not cfg.causal)
    if latent_frames == 1:
        x = encode(video)
        return x, jnp.zeros((*x.shape[:-1], x.shape[-1] + 1), x.dtype)
    usable = [kind for kind, _ in cfg.usable(latent_frames)]
    order = jnp.asarray(np.stack([_padded(kind, frames, pad) if pad else np.arange(frames) for kind in usable]))
    x = encode(jnp.take_along_axis(video, order[kinds].reshape(*order[kinds].shape, 1, 1, 1), axis=1))
    mask, given = jnp.zeros((*x.shape[:-1], 1), x.dtype), jnp.zeros_like(x)
    for index, kind in enumerate(usable):
        head, tail = given_frames(kind, causal=cfg.causal, time=cfg.time)
        if not head and not tail:
            continue
        here, still = jnp.zeros_like(x), kind[:3] == "i2v"
        if head:
            part = encode(video[:, :1]) if still else _reference(video, x, encode, KINDS[kind][0], head, cfg)
            here = here.at[:, :head].set(part[:, :head])
        if tail:
            last = video[:, frames - 1 - 2 * pad :][:, :1]
            part = encode(last) if still else _reference(video, x, encode, -KINDS[kind][1], tail, cfg)
            here = here.at[:, -tail:].set(part[:, -tail:])
        places = np.arange(x.shape[1])
        rows = jnp.asarray((places < head) | (places >= x.shape[1] - tail)).reshape(1, -1, 1, 1, 1)
        chosen = (kinds == index).reshape(-1, 1, 1, 1, 1)
        mask = jnp.where(chosen & rows, 1, mask)
        given = jnp.where(chosen & rows, here, given)
    return x, jnp.concatenate([mask, given], -1)


def _reference(video, x, encode, frames: int, latent_frames: int, cfg: TrainingConditions):
    """The given stretch of a video condition: encoded on its own when causal, cut from the latents when not."""
    if not cfg.causal:
        return x
    return encode(video[:, : frames + 1] if frames > 0 else video[:, frames - 1 :])


def frame_weights(mask):
    """Loss weights [B, T] that leave out stills given at either end, mean 1 a sample; mask [B, T], 1 = given (2.0).

    Where frames between the ends are given too (video conditions) every frame counts.
    """
    mask = mask.astype(bool)
    alone = ~mask[:, 1:-1].any(1)
    ends = jnp.zeros_like(mask).at[:, 0].set(mask[:, 0]).at[:, -1].set(mask[:, -1])
    keep = ~(ends & alone[:, None])
    return keep * (mask.shape[1] / jnp.maximum(keep.sum(1, keepdims=True), 1))


@dataclass(frozen=True)
class GivenFrames:
    """Open-Sora 1.3 training: weights of what a batch loses, and the loss weight of given frames."""

    drop: tuple[tuple[str, float], ...] = (("cond", 0.05), ("text", 0.05), ("null", 0.05), ("keep", 0.85))
    weight: float = 1.0

    def apply(self, batch: dict, frames, key, *, drop: str | None = None) -> dict:
        """The batch with `cond`, `cond_mask`, `mask_index`, `drop_text`, `frame_weights` for the frames given: their
        numbers, or a mask [T] that may be traced. Where that gives nothing, the batch's own `drop_text` stays.

        The reference's names: "cond" drops the *text*, "text" drops the given frames, "null" both. The mask stays.
        `drop` replaces the draw.
        """
        latents = batch["latents"]
        total = latents.shape[1]
        if isinstance(frames, tuple):
            if not 0 < len(frames) < total:
                raise UserError(
                    f"{len(frames)} of {total} latent frames are given; at least one must be, and one be left"
                )
            mask = jnp.zeros(total).at[jnp.array(frames)].set(1.0)
        else:
            mask = frames.astype(jnp.float32)
        count = mask.sum()
        cond_mask = jnp.broadcast_to(mask.reshape(1, -1, 1, 1, 1), latents.shape).astype(latents.dtype)
        cond = batch.get("reference", latents) * cond_mask
        if drop is None:
            names, weights = zip(*self.drop)
            choice = jax.random.categorical(key, jnp.log(jnp.array(weights)))
            lost = lambda *of: jnp.isin(choice, jnp.array([i for i, name in enumerate(names) if name in of]))
        else:
            lost = lambda *of: jnp.array(drop in of)
        others = (total - count * self.weight) / (total - count)
        drop_text = jnp.where(count > 0, lost("null", "cond"), batch.get("drop_text", False))
        return {k: v for k, v in batch.items() if k != "reference"} | {
            "cond": jnp.where(lost("null", "text"), 0, cond),
            "cond_mask": cond_mask,
            "mask_index": frames,
            "drop_text": jnp.broadcast_to(drop_text, latents.shape[:1]),
            "frame_weights": jnp.broadcast_to(jnp.where(mask == 1, self.weight, others), latents.shape[:2]),
        }
