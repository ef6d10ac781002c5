"""VideoGPT's VQ-VAE: recorded cases, manifests, the codebook's life, strides that differ by axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.nn.params import Network
from opensora_jax.vaes import vqvae
from tests.checks import check_case, check_manifest, random_params


@pytest.mark.parametrize("case", ["vqvae_444", "vqvae_codebook_ema"])
def test_recorded_cases(goldens, case):
    check_case(goldens, case)


@pytest.mark.parametrize("preset", ["ucf101_stride4x4x4", "kinetics_stride2x4x4"])
def test_manifests(goldens, preset):
    name = {"kinetics_stride2x4x4": "stride2x4x4"}.get(preset, preset)
    check_manifest(goldens, f"videogpt_vqvae_{name}", "vaes", "vqvae", preset=preset)


@pytest.fixture(scope="module")
def model():
    cfg = vqvae.Config(embedding_dim=4, n_codes=8, n_hiddens=4, n_res_layers=1, downsample=(2, 4, 2))
    net = Network.of(lambda rngs: vqvae.build(cfg, rngs=rngs))
    return net, random_params(net)


def test_axes_shrink_by_their_own_factors(model):
    net, params = model
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 4, 8, 6, 3)), jnp.float32)
    codes = jax.jit(lambda x: net(params, x, method="codes"))(x)
    assert codes.shape == (1, 2, 2, 3) == (1, *vqvae.latent_size(net.module(params).cfg, 4, 8, 6))
    assert net(params, codes, method="decode_codes").shape == x.shape
    with pytest.raises(UserError, match="divide"):
        net(params, x[:, :3], method="encode")


def test_a_training_step_moves_norms_and_passes_gradients_straight_through(model):
    net, params = model
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 4, 8, 4, 3)), jnp.float32)

    @jax.jit
    def loss(params):
        (recon, quantised, z), moved = net(params, x, method="train_step")
        return vqvae.reconstruction_loss(recon, x) + quantised.commitment_loss, (moved, z)

    grads, (moved, z) = jax.grad(loss, has_aux=True)(params)
    assert set(moved) == {"encoder", "decoder"}
    assert np.abs(moved["encoder"]["res_stack"]["1"]["mean"]).max() > 0
    assert np.abs(grads["encoder"]["convs"]["0"]["kernel"]).max() > 0
    np.testing.assert_array_equal(grads["codebook"]["embeddings"], 0)
    assert z.shape == (1, 2, 2, 2, 4)


def test_the_codebook_follows_its_vectors_and_dead_codes_start_anew():
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(3, 2)) * 5
    z = jnp.asarray(np.repeat(centres, 20, 0) + 0.01 * rng.normal(size=(60, 2)), jnp.float32)
    book = vqvae.start_codebook(z, 4, jax.random.key(0))
    assert all(np.isclose(z, row).all(1).any() for row in book["embeddings"])
    step = jax.jit(lambda book, key: vqvae.update_codebook(book, z, vqvae.quantise(z, book["embeddings"]).codes, key))
    for i in range(60):
        book = step(book, jax.random.key(i))
    nearest = np.linalg.norm(centres[:, None] - np.asarray(book["embeddings"]), axis=-1).min(1)
    assert nearest.max() < 0.1
    dead = {"embeddings": jnp.full((1, 2), 99.0), "count": jnp.zeros(1), "sum": jnp.zeros((1, 2))}
    revived = vqvae.update_codebook(dead, z[:2], jnp.zeros(2, int), jax.random.key(1))
    assert np.isclose(z[:2], revived["embeddings"]).all(1).any()


def test_few_vectors_fill_a_large_codebook_with_noise():
    book = vqvae.start_codebook(jnp.eye(3), 7, jax.random.key(0))
    assert len(np.unique(np.asarray(book["embeddings"]), axis=0)) == 7
    assert np.abs(np.asarray(book["embeddings"])[:, None] - np.eye(3)).max(-1).min(1).max() < 0.1


def test_all_codes_alike_have_full_perplexity():
    embeddings = jnp.eye(4)
    np.testing.assert_allclose(vqvae.quantise(embeddings, embeddings).perplexity, 4, rtol=1e-5)
    np.testing.assert_allclose(vqvae.quantise(embeddings[:1], embeddings).perplexity, 1, rtol=1e-5)


def test_a_downsampling_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="powers of two"):
        vqvae.Config(downsample=(3, 4, 4))
