"""CausalVAE of Open-Sora-Plan: posterior, reconstruction, tiles."""

import jax

from opensora_jax.nn import taps
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

TILING = ("tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


def replay(case: Case, run: str) -> dict:
    args = case.args(run)
    tiling = {"tile_overlap_factor" if key == "overlap" else key: value for key, value in args.items()}
    net, params, cfg = case.load("vaes", "causal_vae", **{key: tiling[key] for key in TILING if key in tiling})
    given = {name: channels_last(value) for name, value in case.tensors(run).items()}
    outputs = {}

    def record(method, x):
        @jax.jit
        def run_it(params, x):
            if cfg.tiling:
                return net(params, x, method=method), {}
            with taps.record() as seen:
                out = net(params, x, method=method)
            return out, dict(seen)

        out, seen = run_it(params, x)
        last = f"decoder.up.{len(cfg.hidden_size_mult) - 1}."
        for name, value in seen.items():
            outputs["inter." + name.replace(last, "decoder.up.last.")] = channels_first(value)
        return out

    if "x" in given:
        posterior = record("posterior", given["x"])
        terms = posterior.mean**2 + jax.numpy.exp(posterior.logvar) - 1 - posterior.logvar
        outputs |= {
            "mean": channels_first(posterior.mean),
            "logvar": channels_first(posterior.logvar),
            "kl": 0.5 * terms.sum((1, 2, 4)),  # the reference forgets the width
        }
        if "noise" in given:
            outputs["z_sample"] = channels_first(posterior.sample(noise=given["noise"]))
    if "z" in given:
        outputs["dec"] = channels_first(record("pixels", given["z"]))
    return outputs


FAMILIES = {"osp_causal_vae": Adapter("causal_vae", replay)}
