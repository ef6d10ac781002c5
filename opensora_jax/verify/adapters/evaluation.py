"""Metrics of Open-Sora-Plan's evaluation; what a run gives tells which."""

import numpy as np

from opensora_jax.metrics import clip_score, fvd, psnr, ssim
from opensora_jax.verify.case import Adapter, Case


def _frames_first(videos):
    """[B, T, C, H, W] → [B, T, H, W, C]."""
    return np.moveaxis(videos, 2, -1)


def _pixels(given: dict, args: dict) -> dict:
    videos = [_frames_first(given[name]) for name in ("videos1", "videos2")]
    outputs = {}
    for name, metric in {"psnr": psnr.psnr, "ssim": ssim.ssim}.items():
        values = metric(*videos)
        outputs |= {name: values.mean(0), f"{name}_std": values.std(0)}
    return outputs


def _preprocess(given: dict, args: dict) -> dict:
    videos = np.moveaxis(given["videos"], 1, -1)
    outputs = {"videogpt_uint8_step": [fvd.eight_bits(videos).astype(np.float64).sum()]}
    for convention in fvd.CONVENTIONS:
        out = np.moveaxis(np.asarray(fvd.preprocess(videos, convention, args["res"])), -1, 1)
        outputs[convention] = out[..., :: args["st"], :: args["st"]]
    return outputs


def _frechet(given: dict, args: dict) -> dict:
    distance = [fvd.frechet_distance(given["feats1"], given["feats2"])]
    return {"fd_styleganv": distance, "fd_videogpt": distance, "fd_videogpt_f64": distance}


def _clip(given: dict, args: dict) -> dict:
    scores = clip_score.clip_score(given["real"], given["fake"], np.exp(given["logit_scale_log"]))
    return {"clip_score": scores.mean(), "score_sum": scores.sum()}


REPLAYS = {"videos1": _pixels, "videos": _preprocess, "feats1": _frechet, "fake": _clip}


def replay(case: Case, run: str) -> dict:
    given = case.tensors(run)
    return next(part for name, part in REPLAYS.items() if name in given)(given, case.args(run))


FAMILIES = {"osp_eval": Adapter("evaluate", replay)}
