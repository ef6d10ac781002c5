"""The diagonal Gaussian over latents that the encoder of a KL autoencoder predicts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Posterior(NamedTuple):
    mean: jax.Array  # [B, ..., C]
    logvar: jax.Array

    @classmethod
    def of(cls, moments) -> "Posterior":
        """From the encoder's output [B, ..., 2C]: means, then logarithms of variances."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key=None, noise=None):
        """The mean, unless a key or the noise itself is given."""
        if noise is None and key is None:
            return self.mean
        if noise is None:
            noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self):
        """Divergence from the standard normal, summed over everything but the batch: [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(range(1, terms.ndim))


class Reconstruction(NamedTuple):
    """What an autoencoder gives to the losses of its training."""

    x_rec: jax.Array  # [B, T, H, W, 3] float32
    posterior: Posterior | None  # None: the latents have no distribution
