"""Adversarial losses of VAE training (VQGAN, Esser et al. 2020, arXiv 2012.09841): what a discriminator's logits cost,
and how much the autoencoder heeds them."""

import jax
import jax.numpy as jnp


def hinge(real, fake):
    """The discriminator's loss: real logits above 1, fake ones below -1."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def vanilla(real, fake):
    """The discriminator's cross-entropy."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def wasserstein(real, fake):
    """The discriminator's loss of a Wasserstein GAN (2.0 "wgan-gp")."""
    return 0.5 * (fake.mean() - real.mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla, "non-saturating": vanilla, "wgan-gp": wasserstein}


def generator(fake):
    """The autoencoder's loss: its reconstructions should score high."""
    return -fake.mean()


def non_saturating(fake):
    """The autoencoder's loss as the cross-entropy of calling its reconstructions real (MAGVIT; 1.2)."""
    return jax.nn.softplus(-fake).mean()


GENERATOR_LOSSES = {"hinge": generator, "non-saturating": non_saturating}


def lecam(real, fake, mean_real, mean_fake):
    """LeCam regularisation (arXiv 2104.03310): logits should stay near the running means of the other side."""
    return jax.nn.relu(real.mean() - mean_fake) ** 2 + jax.nn.relu(mean_real - fake.mean()) ** 2


def gradient_penalty(logits_of, x):
    """(norm of the logits' gradient at each sample - 1)²; logits_of: x → logits."""
    grads = jax.grad(lambda x: logits_of(x).sum())(x)
    norms = jnp.sqrt(jnp.square(grads).reshape(len(x), -1).sum(1))
    return jnp.square(norms - 1).mean()


def adaptive_weight(reconstruction_grads, generator_grads, limit: float = 1e4):
    """Norm of the reconstruction loss's gradient over that of the generator's, at the decoder's last kernel."""
    norm = lambda tree: jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))
    return jax.lax.stop_gradient(jnp.clip(norm(reconstruction_grads) / (norm(generator_grads) + 1e-4), 0, limit))


def started(value, step, start_step):
    """`value` from `start_step` on, zero before."""
    return jnp.where(step < start_step, 0.0, value)
