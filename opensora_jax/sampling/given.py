"""Given frames: how each version of the family is told of images and videos to begin with, end on, connect or change, and
how the clips of a long video follow each other.

Open-Sora 1.1 and 1.2 put latents in their places and keep them by a mask (`Masks`); 1.3 adds them through embedders
(`Embedders`); 2.0 concatenates them to the noise (`Channels`).

    film = Channels(codec, script, references)
    for loop in range(script.loops):
        start = film.start(loop, noise)      # what the solver and the network are given
        film.add(latents)                    # what they made of it
    film.pixels(), film.latents()
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import conditions, mask_strategy


@dataclass(frozen=True)
class Codec:
    """An autoencoder, and how frames and latent frames relate in it."""

    encode: Callable  # [T, H, W, 3] in [-1, 1] → latents [T', h, w, C]
    decode: Callable  # latents [B, T', h, w, C], frames or None for all → [B, T, H, W, 3]
    latents_of: Callable[[int], int]  # latent frames of so many frames
    frames_of: Callable[[int], int]  # frames that so many latent frames hold
    chunk: int | None = None  # latent frames that belong together: five for 17 frames in 1.2

    @cached_property
    def time(self) -> int:
        return self.frames_of(3) - self.frames_of(2)

    @cached_property
    def causal(self) -> bool:
        """Is the first latent frame a single frame?"""
        return self.frames_of(2) < 2 * self.time

    def whole(self, video):
        """The longest beginning that the autoencoder gives back whole."""
        count, step = self.latents_of(len(video)), self.chunk or 1
        count -= count % step
        while count > 0 and self.frames_of(count) > len(video):
            count -= step
        return video[: self.frames_of(count) if count > 0 else 1]


@dataclass(frozen=True)
class Script:
    """What was asked for. One kind for all samples, a mask strategy for each."""

    kind: str = ""  # of diffusion.conditions.KINDS; empty: nothing is given
    strategies: tuple[str, ...] = ()
    frames: int = 17  # of a clip
    loops: int = 1  # clips, each beginning with the end of the one before
    carry: int = 5  # how many latent frames that is
    edit: float = 0.0  # how far those may change
    hold: bool = False  # 1.3: given frames are set anew at every step


@dataclass(frozen=True)
class Start:
    """What the solver and the network are given for one clip."""

    latents: Any  # [B, T, H, W, C]: noise, with given frames in place where there is a mask
    mask: Any = None  # [B, T], 1 generate, 0 keep
    held: tuple | None = None  # latents and [B, T] mask of frames that are set anew at every step
    arguments: dict = field(default_factory=dict)  # of the network
    without_image: dict = field(default_factory=dict)  # what of them changes where the image is left out
    frames: tuple[int, ...] = ()  # that are given, for the network to know when it is compiled


def kind_of(condition: str, references: list) -> str:
    """The condition asked for, or what the references look like: a still begins a clip, two are connected, a video is
    continued."""
    if condition and condition != "t2v" and not references:
        raise UserError(f"condition={condition} needs an image or a video that it takes frames from")
    if condition or not references:
        return "" if condition == "t2v" else condition
    stills = [len(reference) == 1 for reference in references]
    kind = {(True,): "i2v_head", (True, True): "i2v_loop", (False,): "v2v_head"}.get(tuple(stills))
    if kind is None:
        raise UserError(
            f"{len(references)} references are given: say by condition or mask_strategy which frames they give"
        )
    return kind


def strategy_of(kind: str, carry: int) -> str:
    """A condition in the language of masks: the first reference gives the head, the last one the tail."""
    tail, last = "0,-1,-1,-1,1", f"0,-1,-{carry},-{carry},{carry}"
    known = {"": "", "i2v_head": "0", "i2v_tail": tail, "i2v_loop": f"0;{tail}"}
    known |= {"v2v_head": f"0,0,0,0,{carry}", "v2v_tail": last}
    if kind not in known:
        raise UserError(f"condition {kind!r} is not one of {', '.join(filter(None, known))}, which this network knows")
    return known[kind]


class Masks:
    """Open-Sora 1.1 and 1.2: frames are kept, or noised to the edit ratio, by a mask that the solver works with and the
    network sees as times of its own. Clips are decoded, and encoded again to begin the next one."""

    argument = "x_mask"
    shrinks = 0  # steps more in which an image scale sinks than there are

    def __init__(self, codec: Codec, script: Script, references: list):
        self.codec, self.script = codec, script
        self.references = [[codec.encode(part) for part in parts] for parts in references]
        plain = strategy_of(script.kind, script.carry)
        asked = script.strategies or [""] * len(references)
        self.strategies = [strategy or (plain if parts else "") for strategy, parts in zip(asked, references)]
        self.clips, self.made = [], []

    def start(self, loop: int, noise) -> Start:
        script = self.script
        if loop:
            ends = [self.codec.encode(clip) for clip in self.clips[-1]]
            self.references, self.strategies = mask_strategy.take_over(
                np.stack(ends), self.references, self.strategies, loop, script.carry, script.edit
            )
        latents, mask = mask_strategy.apply(noise, self.references, self.strategies, loop, self.codec.chunk)
        return Start(latents, mask=None if mask is None or (mask == 1).all() else mask)

    def add(self, latents) -> None:
        self.made.append(latents)
        self.clips.append(np.asarray(self.codec.decode(latents, self.script.frames)))

    def pixels(self):
        seen = self.codec.frames_of(self.script.carry) if len(self.clips) > 1 else 0
        return np.concatenate([self.clips[0], *(clip[:, seen:] for clip in self.clips[1:])], 1)

    def latents(self):
        return np.concatenate([self.made[0], *(made[:, self.script.carry :] for made in self.made[1:])], 1)


class Embedders:
    """Open-Sora 1.3: given latents enter beside the noise, and their frames read the null caption. Clips stay latents
    until all are made, and are decoded at once."""

    argument = "cond_mask"
    shrinks = 0

    def __init__(self, codec: Codec, script: Script, references: list):
        self.codec, self.script = codec, script
        if script.kind and not all(references):
            raise UserError("prompts with and without references cannot share a call here; give them one by one")
        self.references = [[codec.encode(codec.whole(part)) for part in parts] for parts in references]
        self.made = []

    def start(self, loop: int, noise) -> Start:
        script, shape = self.script, noise.shape
        if loop:
            last = {"frames": script.carry, "last": loop == script.loops - 1}
            cond, given = mask_strategy.next_loop(script.kind, shape, self.made[-1], self.references, **last)
        else:
            first = {"frames": script.carry, "loops": script.loops}
            cond, given = mask_strategy.first_loop(script.kind or None, shape, self.references, **first)
        if not given:
            return Start(noise)
        mask = np.zeros(shape[:2], np.float32)
        mask[:, list(given)] = 1
        arguments = {"cond": cond, "cond_mask": np.broadcast_to(mask[:, :, None, None, None], shape)}
        held = (cond, mask) if script.hold else None
        return Start(noise, None, held, arguments, {"cond": np.zeros_like(cond)}, given)

    def add(self, latents) -> None:
        self.made.append(latents)

    def latents(self):
        joined = np.concatenate([self.made[0], *(made[:, self.script.carry :] for made in self.made[1:])], 1)
        spare = joined.shape[1] % (self.codec.chunk or 1) if self.script.loops > 1 else 0
        return joined[:, : joined.shape[1] - spare]

    def pixels(self):
        frames = self.script.frames if self.script.loops == 1 else None
        return np.asarray(self.codec.decode(self.latents(), frames))


class Channels:
    """Open-Sora 2.0: a mask and given latents in channels of their own. After i2v the given latents take the place of the
    generated ones. Clips that follow are v2v_head of the end of the one before (the reference makes single clips)."""

    argument = "cond"
    shrinks = 1  # its image scale would reach the floor one step after the last

    def __init__(self, codec: Codec, script: Script, references: list):
        self.codec, self.script = codec, script
        self.references = [self._encoded(script.kind, parts) for parts in references]
        if script.loops > 1 and script.kind not in ("", "i2v_head", "v2v_head", "v2v_head_easy"):
            raise UserError(
                f"loop={script.loops} goes on from the end of a clip, which {script.kind} gives: use loop=1"
            )
        self.clips, self.made = [], []

    def start(self, loop: int, noise) -> Start:
        self.kind, given = self.script.kind, self.references
        if loop:
            self.kind = "v2v_head"
            given = [self._encoded(self.kind, [clip[-self._carried :]]) for clip in self.clips[-1]]
        self.given = given
        if not self.kind:
            return Start(noise)
        mask, latents = conditions.place(noise.shape, self.kind, given, causal=self.codec.causal)
        cond = np.concatenate([mask, latents], -1)
        return Start(noise, arguments={"cond": cond}, without_image={"cond": np.zeros_like(cond)})

    @property
    def _carried(self) -> int:
        return conditions.KINDS["v2v_head"][0] + self.codec.causal

    def _encoded(self, kind: str, parts) -> list | None:
        """The frames that a kind gives, encoded by themselves: the head's of the first part, the tail's of the last."""
        if not parts:
            return None
        count = lambda frames: 1 if not frames else frames + self.codec.causal
        head, tail = conditions.KINDS.get(kind) or conditions.given_frames(kind)  # the latter names the known ones
        encoded = [] if head is None else [self.codec.encode(parts[0][: count(head)])]
        return encoded if tail is None else [*encoded, self.codec.encode(parts[-1][-count(tail) :])]

    def add(self, latents) -> None:
        latents = np.asarray(conditions.put_back(latents, self.kind, self.given)) if self.kind else latents
        self.made.append(latents)
        clip = np.asarray(self.codec.decode(latents, self.script.frames))
        if self.kind.startswith("i2v") and not self.codec.causal:  # a still was repeated to fill a latent frame
            head, tail = (n * (self.codec.time - 1) for n in conditions.given_frames(self.kind))
            clip = clip[:, head : clip.shape[1] - tail]
        self.clips.append(clip)

    def pixels(self):
        return np.concatenate([self.clips[0], *(clip[:, self._carried :] for clip in self.clips[1:])], 1)

    def latents(self):
        seen, _ = conditions.given_frames("v2v_head", causal=self.codec.causal)
        return np.concatenate([self.made[0], *(made[:, seen:] for made in self.made[1:])], 1)


def way_of(takes: frozenset[str], *, masked: bool) -> type | None:
    """How a network that takes these arguments is given frames; a mask strategy speaks to the mask alone."""
    if masked:
        return Masks if "x_mask" in takes else None
    return next((way for way in (Embedders, Channels, Masks) if way.argument in takes), None)
