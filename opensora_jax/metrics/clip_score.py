"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well pictures and captions agree; 100 times a cosine with the
released networks, whose logit scale is 100."""

import jax.numpy as jnp


def clip_score(a, b, logit_scale=100.0):
    """Per pair of features a, b [N, D], not normalised: [N] float32."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    return logit_scale * (unit(a) * unit(b)).sum(-1)
