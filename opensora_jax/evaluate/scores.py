"""Metrics as they gather over batches of videos: `update(real, generated, prompts)`, then `result()`."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.metrics import clip_score, fvd, lpips, psnr, ssim
from opensora_jax.verify.case import load_network
from opensora_jax.weights import lpips as lpips_weights
from opensora_jax.weights.files import open_checkpoint


class PerVideo:
    """A number a video."""

    def __init__(self, score: Callable):
        self.score, self.values = score, []

    def update(self, real, generated, prompts) -> None:
        if generated is not None:
            self.values += [float(value) for value in self.score(real, generated, prompts)]

    def result(self) -> dict:
        return {"value": float(np.mean(self.values)), "std": float(np.std(self.values)), "per_video": self.values}


class FVD:
    """Distances of two sets, for each clip length."""

    def __init__(self, network: Callable, lengths, convention: str, batch: int):
        self.network, self.lengths = network, tuple(lengths)
        self.options = {"convention": convention, "batch": batch}
        self.features: dict = {}

    def update(self, real, generated, prompts) -> None:
        for side, clips in (("real", real), ("generated", generated)):
            for length in self.lengths if clips is not None else ():
                found = fvd.features(self.network, clips[:, :length], **self.options)
                self.features.setdefault((side, length), []).append(found)

    def result(self) -> dict:
        sets = {key: np.concatenate(parts) for key, parts in self.features.items()}
        distances = {n: fvd.frechet_distance(sets["real", n], sets["generated", n]) for n in self.lengths}
        return {"value": float(np.mean(list(distances.values()))), "by_length": distances}


def make(name: str, args):
    """A metric as the flags describe it, its network loaded."""
    return {"psnr": _psnr, "ssim": _ssim, "lpips": _lpips, "fvd": _fvd, "clip_score": _clip_score}[name](args)


def _psnr(args):
    return PerVideo(lambda real, generated, _: psnr.psnr(real, generated).mean(1))


def _ssim(args):
    return PerVideo(lambda real, generated, _: ssim.ssim(real, generated).mean(1))


def _lpips(args):
    tensors: dict = {}
    for path in args.lpips.split(","):
        tensors |= _tensors(open_checkpoint(path))
    network, cfg = _network("models", "lpips", lpips_weights.joined(tensors), {}, f"--lpips={args.lpips}")
    spatial = cfg.net == "alex"  # as the published tables: the mean of a map of full size
    distance = jax.jit(lambda x, y: network(x, y, spatial=spatial))
    return PerVideo(lambda real, generated, _: lpips.lpips(distance, real, generated).mean(1))


def _fvd(args):
    network, _ = _network("models", "i3d", _tensors(open_checkpoint(args.i3d)), {}, f"--i3d={args.i3d}")
    lengths = range(fvd.MIN_FRAMES, args.num_frames + 1) if args.fvd_lengths == "mean" else (args.num_frames,)
    return FVD(jax.jit(network), lengths, args.fvd_convention, args.batch_size)


def _clip_score(args):
    from opensora_jax.text.tokenizers import load_tokenizer

    found = open_checkpoint(args.clip)
    tensors, told = _tensors(found), found.config
    images, seen_as = _network("models", "clip_vision", tensors, told, f"--clip={args.clip}")
    texts, read_as = _network("text", "clip", tensors, told, f"--clip={args.clip}")
    tokenizer = load_tokenizer(Path(args.clip), max_length=read_as.max_position_embeddings)
    scale = np.exp(tensors["logit_scale"]) if "logit_scale" in tensors else 100.0
    size, look, read = seen_as.image_size, jax.jit(images), jax.jit(lambda ids, mask: texts(ids, mask).projected)

    def score(_, generated, prompts):
        captions = read(*tokenizer(prompts))
        pairs = [(look(clip_pixels(clip, size)), caption) for clip, caption in zip(generated, captions)]
        return [clip_score.clip_score(seen, jnp.broadcast_to(said, seen.shape), scale).mean() for seen, said in pairs]

    return PerVideo(score)


def clip_pixels(frames: np.ndarray, size: int) -> np.ndarray:
    """[T, H, W, 3] in [0, 1] → the centre square of [T, size, size, 3], bicubic with antialiasing as CLIP was trained."""
    from PIL import Image

    height, width = frames.shape[1:3]
    short = min(height, width)
    shape = (int(size * width / short), int(size * height / short))  # PIL says width first
    left, top = ((side - size) // 2 for side in shape)
    pictures = [
        Image.fromarray(frame).resize(shape, Image.Resampling.BICUBIC) for frame in fvd.eight_bits(frames + 0.5 / 255)
    ]
    return np.stack([np.asarray(p)[top : top + size, left : left + size] for p in pictures]).astype(np.float32) / 255


def _tensors(found) -> dict[str, np.ndarray]:
    """All of a checkpoint; halves become float32, which is what evaluation computes in."""
    arrays = {name: found.read(name) for name in found.shapes}
    return {name: a if a.dtype.kind in "iub" else a.astype(np.float32) for name, a in arrays.items()}


def _network(room: str, stem: str, tensors: dict, told: dict, flag: str):
    """A published network as a function of arrays, and its Config."""
    try:
        network, params, cfg = load_network(room, stem, tensors, told)
    except (KeyError, StopIteration) as missing:
        raise UserError(f"{flag} is no {stem} checkpoint: it has no {missing}") from None
    return (lambda *arrays, **options: network(params, *arrays, **options)), cfg
