"""Mask strategies of Open-Sora 1.1-1.3: which latent frames of a clip come from which reference, and how firmly.

A strategy is groups joined by ";", each "loop, reference, start in reference, start in target, length, edit ratio" with
defaults 0,0,0,0,1,0: `0` keeps the first frame of the first reference; `0,1,0,-1,1` ends on the second; an edit ratio
between 0 and 1 re-noises the frames to that level. Longer videos are made in loops: each takes over the tail of the last.
"""

from typing import NamedTuple

import numpy as np

from opensora_jax.common.errors import UserError

DEFAULTS = ("0", "0", "0", "0", "1", "0")


class Edit(NamedTuple):
    loop: int
    reference: int
    start: int  # in the reference; negative counts from its end
    target: int  # in the clip
    length: int
    ratio: float


def fields(strategy: str) -> list[list[str]]:
    """The groups' six fields as written, defaults filled in."""
    groups = []
    for group in strategy.split(";"):
        given = group.split(",")
        if len(given) > len(DEFAULTS):
            raise UserError(f"mask strategy {group!r} has {len(given)} fields; at most six: {','.join(DEFAULTS)}")
        groups.append(given + list(DEFAULTS[len(given) :]))
    return groups


def parse(strategy: str | None) -> list[Edit]:
    if not strategy:
        return []
    edits = []
    for group in fields(strategy):
        try:
            edits.append(Edit(*map(int, group[:5]), float(group[5])))
        except ValueError:
            raise UserError(f"mask strategy {','.join(group)!r}: five whole numbers and an edit ratio") from None
    return edits


def nearest_multiple(value: int, step: int, size: int) -> int:
    """The multiple of `step` nearest to value (halves go down) that still starts a whole step within size."""
    count, rest = divmod(value, step)
    if rest > step / 2 and count < size // step - 1:
        count += 1
    return count * step


def apply(latents, references: list, strategies: list, loop: int, align: int | None = None):
    """Latents with reference frames in place, and the mask [B, T]: 1 generate, edit ratio where pasted.

    latents [B, T, H, W, C]; references: for each sample a list of latents [T', H, W, C]; strategies: for each sample a
    strategy or None. `align`: starts snap to multiples of it (5 latent frames make a chunk of the 1.2 autoencoder).
    Lengths that do not fit are cut. Without any strategies the mask is None.
    """
    out = np.array(latents)
    if not strategies:
        return out, None
    frames = out.shape[1]
    mask = np.ones(out.shape[:2], np.float32)
    for b, strategy in enumerate(strategies):
        for edit in parse(strategy):
            if edit.loop != loop:
                continue
            if references[b] is None or not -len(references[b]) <= edit.reference < len(references[b]):
                given = 0 if references[b] is None else len(references[b])
                raise UserError(f"mask strategy {strategy!r} asks for reference {edit.reference}; {given} are given")
            source = np.asarray(references[b][edit.reference])
            start = edit.start + (len(source) if edit.start < 0 else 0)
            target = edit.target + (frames if edit.target < 0 else 0)
            if align is not None:
                start, target = nearest_multiple(start, align, len(source)), nearest_multiple(target, align, frames)
            length = min(edit.length, frames - target, len(source) - start)
            out[b, target : target + length] = source[start : start + length]
            mask[b, target : target + length] = edit.ratio
    return out, mask


def take_over(generated, references: list, strategies: list, loop: int, frames: int, ratio: float = 0.0):
    """References and strategies for the next loop: the last `frames` of the clip just generated become its first.

    generated [B, T, H, W, C] latents; returns new lists.
    """
    grown, extended = [], []
    for b, clip in enumerate(np.asarray(generated)):
        grown.append([*(references[b] or []), clip])
        added = f"{loop},{len(grown[-1]) - 1},-{frames},0,{frames},{ratio}"
        extended.append(f"{strategies[b]};{added}" if strategies[b] else added)
    return grown, extended


def first_loop(kind: str | None, shape: tuple[int, ...], references: list, *, frames: int, loops: int):
    """Open-Sora 1.3: reference latents [B, T, H, W, C] and the frames given in the first of `loops` loops.

    kind: None, i2v_head, i2v_tail, i2v_loop or v2v_head (its first `frames`). With several loops the tail is left to the
    last one. A second reference serves the tail of i2v_loop with its first frame.
    """
    total = shape[1]
    if kind is None:
        given = ()
    elif kind == "v2v_head":
        given = tuple(range(min(frames, total, *(len(parts[0]) for parts in references))))
    elif kind in ("i2v_head", "i2v_loop"):
        given = (0,)
    elif kind == "i2v_tail":
        given = (-1,) if loops == 1 else ()
    else:
        raise UserError(f"unknown condition {kind!r}; choose i2v_head, i2v_tail, i2v_loop or v2v_head")
    out = np.zeros(shape, np.float32)
    for b, parts in enumerate(references if given else []):
        for t in given:
            out[b, t] = parts[0][t]
    if kind == "i2v_loop" and loops <= 1:
        out[:, -1] = [_tail(parts) for parts in references]
        given += (-1,)
    return out, tuple(t % total for t in given)


def next_loop(kind: str | None, shape: tuple[int, ...], generated, references: list, *, frames: int, last: bool):
    """The same for a later loop: the last `frames` of the clip before, and the tail where it is due."""
    out = np.zeros(shape, np.float32)
    out[:, :frames] = np.asarray(generated)[:, -frames:]
    given = tuple(range(frames))
    if kind == "i2v_loop" or (kind == "i2v_tail" and last):
        out[:, -1] = [_tail(parts) for parts in references]
        given += (shape[1] - 1,)
    return out, given


def _tail(parts: list):
    return np.asarray(parts[0][-1] if len(parts) == 1 else parts[1][0])
