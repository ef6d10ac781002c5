"""Ancestral and DDIM sampling on data one knows: a Gaussian, whose best noise prediction is linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion.iddpm import Config, tables
from opensora_jax.sampling.ddim import DDIM, Ancestral

SHAPE = (2, 3, 2, 2, 4)
MEAN, SPREAD = 1.5, 0.5


def best(cfg):
    """The network that knows the data: normal, mean 1.5, deviation 0.5; variance in the middle of its range."""
    bar = jnp.asarray(tables(Config(diffusion_steps=cfg.diffusion_steps)).alphas_cumprod, jnp.float32)

    def predict(x, t):
        a = bar[t].reshape(-1, 1, 1, 1, 1)
        noise = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * SPREAD**2 + 1 - a)
        return jnp.concatenate([noise, jnp.zeros_like(x)], -1)

    return predict


def run(solver, predict, z, *, noise=None, **start):
    times, state = solver.schedule(z.shape), solver.init(z, **start)
    step = jax.jit(lambda state, i, noise: solver.step(predict, state, i, times, noise=noise))
    for i in range(solver.steps):
        state = step(state, i, None if noise is None else noise[i])
    return np.asarray(state.latents)


def test_ancestral_and_ddim_reach_the_data():
    cfg, z = Config(respacing="50"), jax.random.normal(jax.random.key(0), (64, 2, 2, 2, 2))
    for solver in (Ancestral(cfg), DDIM(cfg, eta=0.5)):
        out = run(solver, best(cfg), z, key=jax.random.key(1))
        assert abs(out.mean() - MEAN) < 0.06 and abs(out.std() - SPREAD) < 0.06
    out = run(DDIM(cfg), best(cfg), z)
    np.testing.assert_allclose(out, MEAN + SPREAD * np.asarray(z), atol=0.12)


def test_ddim_turns_back():
    cfg = Config(respacing="200")
    x = MEAN + SPREAD * jax.random.normal(jax.random.key(0), SHAPE)
    z = run(DDIM(cfg, reverse=True), best(cfg), x)
    np.testing.assert_allclose(
        run(DDIM(cfg), best(cfg), jnp.asarray(z)), x, atol=0.06
    )  # 200 first-order steps each way
    assert abs(z.mean()) < 0.5


def test_clipping_bounds_the_prediction():
    cfg = Config(respacing="5")
    out = run(DDIM(cfg, clip=True), best(cfg), jnp.full(SHAPE, 2.0))
    assert out.max() <= 1 + 1e-5


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(9)]


def test_masked_frames_join_at_their_level(draws):
    cfg, seen = Config(respacing="4"), []
    mask = jnp.array([[0.0, 0.5, 1.0]] * 2)
    solver = Ancestral(cfg)
    times, state = solver.schedule(SHAPE), solver.init(draws[0], mask=mask)

    @jax.jit
    def step(state, i, noise):
        fed = []
        predict = lambda x, t, x_mask: fed.append((t, x, x_mask)) or jnp.zeros((*x.shape[:-1], 8))
        return solver.step(predict, state, i, times, noise=noise), fed[0]

    noise = list(zip(draws[1:5], draws[5:]))
    before = []
    for i in range(4):
        before.append(np.asarray(state.latents))
        state, fed = step(state, i, noise[i])
        seen.append(tuple(map(np.asarray, fed)))
    assert [t[0].item() for t, _, _ in seen] == [999, 666, 333, 0]
    assert [m[0].tolist() for _, _, m in seen] == [[False, False, True]] * 2 + [[False, True, True]] * 2
    np.testing.assert_array_equal(before[2][:, :1], draws[0][:, :1])
    bar = tables(cfg).alphas_cumprod[2]
    joined = np.sqrt(bar) * before[1][:, 1] + np.sqrt(1 - bar) * np.asarray(noise[1][0])[:, 1]
    np.testing.assert_allclose(seen[1][1][:, 1], joined, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(before[1], np.where([[[[[1]]], [[[1]]], [[[0]]]]] * 2, draws[0], before[1]))
    assert np.abs(np.asarray(state.latents)[:, 0] - draws[0][:, 0]).max() > 1e-3  # the quirk


def test_a_missing_key_is_named(draws):
    solver = Ancestral(Config(respacing="2"))
    with pytest.raises(UserError, match="key"):
        solver.step(best(solver.process), solver.init(draws[0]), 0, solver.schedule(SHAPE))


def test_keys_decide():
    cfg, z = Config(respacing="3"), jnp.ones(SHAPE)
    at = lambda seed: run(Ancestral(cfg), best(cfg), z, key=jax.random.key(seed))
    np.testing.assert_array_equal(at(1), at(1))
    assert np.abs(at(1) - at(2)).max() > 1e-3
