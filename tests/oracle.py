"""Judges clips of the procedural data set by looking at pixels alone: which colour, shape, direction and background,
or nothing at all for noise, still pictures and shapes in fragments.

    judge(frames) → {"colour": "red", "shape": "circle", "direction": "left", "background": "dark"} or a refusal (str)
"""

import colorsys
from collections import Counter

import numpy as np

from opensora_jax.data.shapes import BACKGROUNDS, COLOURS, DIRECTIONS, NOVEL_COLOURS, SHAPES, _distance, parse_caption

ATTRIBUTES = ("colour", "shape", "direction", "background")
HUES = {name: colorsys.rgb_to_hsv(*(np.array(rgb) / 255))[0] for name, rgb in (COLOURS | NOVEL_COLOURS).items()}


def matches(frames: np.ndarray, caption: str) -> dict[str, bool]:
    """Which attributes of the caption the clip shows; none when the judge refuses it."""
    return agrees(judge(frames), caption)


def agrees(seen: dict[str, str] | str, caption: str) -> dict[str, bool]:
    scene = parse_caption(caption)
    return {name: not isinstance(seen, str) and seen[name] == getattr(scene, name) for name in ATTRIBUTES}


def judge(frames: np.ndarray) -> dict[str, str] | str:
    frames = frames.astype(np.float32)
    size = frames.shape[1]
    background = _background(frames)
    if isinstance(background, str):
        return background
    level, grey = background
    looks = [_look(frame, grey) for frame in frames]
    good = [look for look in looks if not isinstance(look, str)]
    if len(good) < 0.85 * len(looks):
        return Counter(look for look in looks if isinstance(look, str)).most_common(1)[0][0]
    colour, votes = Counter(look["colour"] for look in good).most_common(1)[0]
    if votes < 0.8 * len(good):
        return "the colour changes"
    fits = {shape: np.mean([look["fits"][shape] for look in good]) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name])
    if fits[shape] < 0.84:
        return f"no clean shape (best {shape}, overlap {fits[shape]:.2f})"
    areas = np.array([look["area"] for look in good])
    if areas.std() > 0.25 * areas.mean():
        return "the shape changes its size"
    direction = _direction(np.array([look["centre"] for look in good]), size)
    if direction not in DIRECTIONS:
        return direction
    return {"colour": colour, "shape": shape, "direction": direction, "background": level}


def _background(frames):
    border = np.concatenate([frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3)])
    border = np.concatenate([border, frames[:, :, :2].reshape(-1, 3), frames[:, :, -2:].reshape(-1, 3)])
    grey = np.median(border, axis=0)
    if np.ptp(grey) > 28:
        return "the background is coloured"
    if (np.abs(frames - grey).max(-1) < 36).mean() < 0.7:
        return "the background is not plain"
    (_, dark), (light, _) = BACKGROUNDS["dark"], BACKGROUNDS["light"]
    if dark + 40 < grey.mean() < light - 40:
        return "the background is neither dark nor light"
    return ("dark" if grey.mean() < 128 else "light"), grey


def _look(frame, grey):
    """One frame: the shape's colour, centre, area, and how well each ideal shape covers it."""
    away = np.abs(frame - grey).max(-1)
    mask = away > 48
    area = mask.mean()
    if not 0.015 < area < 0.3:
        return "no shape of a sensible size"
    body = _largest(mask)
    if body.sum() < 0.88 * mask.sum():
        return "the shape is in fragments"
    solid = away > 0.8 * np.median(away[body])
    paint = np.median(frame[solid & body], axis=0)
    hue, saturation, _ = colorsys.rgb_to_hsv(*(paint / 255))
    if saturation < 0.3:
        return "the shape has no colour"
    colour = min(HUES, key=lambda name: min(abs(hue - HUES[name]), 1 - abs(hue - HUES[name])))
    cover = np.clip(away / np.median(away[solid & body]), 0, 1) * _grown(body)
    total = cover.sum()
    pixel = np.arange(len(frame)) + 0.5
    y, x = (cover.sum(1) @ pixel) / total, (cover.sum(0) @ pixel) / total
    fits = {shape: _overlap(shape, cover, y, x, pixel) for shape in SHAPES}
    return {"colour": colour, "centre": (y, x), "area": total, "fits": fits}


def _overlap(shape, cover, y, x, pixel):
    """Intersection over union with the ideal shape of the same area at the same centre of mass."""
    unit = {"circle": np.pi, "square": (2 * 0.86) ** 2, "triangle": 3 * np.sqrt(3) / 4 * 1.15**2}[shape]
    radius = np.sqrt(cover.sum() / unit)
    if shape == "triangle":
        y = y - 0.25 * 1.15 * radius  # the shape's origin is the middle of its box, above the centre of mass
    ideal = np.clip(0.5 - _distance(shape, pixel[:, None] - y, pixel[None] - x, radius), 0, 1)
    return np.minimum(ideal, cover).sum() / np.maximum(ideal, cover).sum()


def _direction(centres, size):
    path = centres[-1] - centres[0]
    axis = int(np.argmax(np.abs(path)))
    steps = np.diff(centres[:, axis]) * np.sign(path[axis])
    if abs(path[axis]) < 0.15 * size:
        return "nothing moves"
    if np.ptp(centres[:, 1 - axis]) > 0.5 * abs(path[axis]) or (steps < -0.02 * size).any():
        return "the motion has no clear direction"
    wanted = tuple(int(np.sign(path[axis])) * (i == axis) for i in (0, 1))
    return next(name for name, step in DIRECTIONS.items() if step == wanted)


def _grown(mask):
    padded = np.pad(mask, 1)
    return np.maximum.reduce(
        [padded[1 + a : len(padded) - 1 + a, 1 + b : padded.shape[1] - 1 + b] for a in (-1, 0, 1) for b in (-1, 0, 1)]
    )


def _largest(mask):
    """The biggest connected piece, by growing from seeds."""
    rest, best = mask.copy(), np.zeros_like(mask)
    while rest.sum() > best.sum():
        piece = np.zeros_like(mask)
        piece[tuple(np.argwhere(rest)[0])] = True
        while (grown := _grown(piece) & mask).sum() > piece.sum():
            piece = grown
        rest &= ~piece
        best = max(best, piece, key=np.sum)
    return best
