"""VideoGPT's VQ-VAE: reconstruction, codes, and one step of the codebook's moving averages."""

import jax
import jax.numpy as jnp

from opensora_jax.nn import taps
from opensora_jax.vaes import vqvae
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last


def replay(case: Case, run: str) -> dict:
    return _codebook(case, run) if "embeddings" in case.weights else _model(case, run)


def _model(case: Case, run: str) -> dict:
    net, params, _ = case.load("vaes", "vqvae")
    given = case.tensors(run)
    x = 2 * channels_last(given["x"])  # the reference's pixels are in [-0.5, 0.5]

    @jax.jit
    def forward(params, x, codes):
        with taps.record() as seen:  # the reference decoded given codes last: intermediates of the decoder are theirs
            out = net(params, x)
            decoded = None if codes is None else net(params, codes, method="decode_codes")
        return *out, decoded, dict(seen)

    recon, quantised, z, decoded, seen = forward(params, x, given.get("codes"))
    ordered = jnp.sort(vqvae.distances(z, params["codebook"]["embeddings"]), -1)
    outputs = {
        "recon": channels_first(recon) / 2,
        "recon_loss": vqvae.reconstruction_loss(recon, x),
        "embeddings_st": channels_first(quantised.embeddings),
        "encodings": quantised.codes,
        "commitment_loss": quantised.commitment_loss,
        "perplexity": quantised.perplexity,
        "pre_vq": channels_first(z),
        "inter.code_margin_min": (ordered[..., 1] - ordered[..., 0]).min(),
        **{f"inter.{name}": channels_first(value) for name, value in seen.items()},
    }
    return outputs if decoded is None else outputs | {"decoded": channels_first(decoded) / 2}


def _codebook(case: Case, run: str) -> dict:
    names = {"embeddings": "embeddings", "N": "count", "z_avg": "sum"}
    codebook = {ours: jnp.asarray(case.weights[theirs]) for theirs, ours in names.items()}
    z = channels_last(case.tensors(run)["z"])
    quantised = vqvae.quantise(z, codebook["embeddings"])
    moved = vqvae.update_codebook(codebook, z, quantised.codes)
    return {
        "embeddings_st": channels_first(quantised.embeddings),
        "encodings": quantised.codes,
        "commitment_loss": quantised.commitment_loss,
        "perplexity": quantised.perplexity,
        **{f"new_{theirs}": moved[ours] for theirs, ours in names.items()},
    }


FAMILIES = {"videogpt_vqvae": Adapter("vqvae", replay)}
