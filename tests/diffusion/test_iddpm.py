"""IDDPM tables, losses and bound against float64 formulas; respacing; the speed variant."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import iddpm
from opensora_jax.diffusion.iddpm import Config, tables

SHAPE = (2, 3, 2, 2, 4)


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("schedule", ["linear", "quad", "const", "jsd", "warmup10", "warmup50", "squaredcos_cap_v2"])
def test_tables_belong_together(schedule):
    tab = tables(Config(schedule, diffusion_steps=50))
    bar = np.cumprod(1 - iddpm.betas(schedule, 50))
    np.testing.assert_allclose(tab.alphas_cumprod, bar, rtol=1e-12)
    assert ((tab.betas > 0) & (tab.betas <= 1)).all() and tab.steps == 50
    # x_{t-1} drawn from the posterior of a known x_0 has the forward process's own mean.
    mean = tab.posterior_mean_coef1 + tab.posterior_mean_coef2 * np.sqrt(bar)
    np.testing.assert_allclose(mean, np.sqrt(tab.alphas_cumprod_prev), rtol=1e-9)


def test_respacing_keeps_the_noise_levels():
    full = tables(Config())
    for respacing, kept in {
        "4": [0, 333, 666, 999],
        "ddim4": [0, 250, 500, 750],
        "2,1,2": [0, 333, 334, 667, 999],
        "": range(1000),
    }.items():
        tab = tables(Config(respacing=respacing))
        assert tab.timestep_map.tolist() == list(kept)
        np.testing.assert_allclose(tab.alphas_cumprod, full.alphas_cumprod[list(kept)], rtol=1e-9)
    rounded = tables(Config(respacing="100", float32_tables=True))
    assert rounded.betas.dtype == rounded.posterior_mean_coef1.dtype == np.float32


def test_mistakes_are_named():
    with pytest.raises(UserError, match="ddim999"):
        tables(Config(respacing="ddim999"))
    with pytest.raises(UserError, match="section of 500"):
        tables(Config(respacing="600,10"))
    with pytest.raises(UserError, match="squaredcos_cap_v2"):
        tables(Config("cosine"))
    with pytest.raises(UserError, match="learned_range"):
        Config(variance="large")


@pytest.mark.parametrize(
    "variance, predict", [("learned_range", "noise"), ("fixed_small", "x0"), ("fixed_large", "noise")]
)
def test_loss_and_bound_are_their_definitions(draws, variance, predict):
    x, noise, output = draws
    cfg = Config(variance=variance, predict=predict)
    tab, t = tables(cfg), np.array([400, 3])
    bar, beta = tab.alphas_cumprod[t], tab.betas[t]
    b = lambda v: np.reshape(v, (2, 1, 1, 1, 1))
    full = jnp.concatenate([output, jnp.tanh(noise)], -1) if cfg.learned else output
    _, terms = iddpm.loss(lambda x, t: full, {"latents": x}, None, cfg, noise=noise, t=jnp.asarray(t))

    x, noise, output = (np.asarray(v, np.float64) for v in (x, noise, output))
    mse = ((output - (noise if predict == "noise" else x)) ** 2).mean((1, 2, 3, 4))
    np.testing.assert_allclose(terms["mse"], mse, rtol=1e-5)
    if not cfg.learned:
        assert "vb" not in terms
        mapped = iddpm.log_variance(full, jnp.asarray(x, jnp.float32), jnp.asarray(t), cfg)[:, 0, 0, 0, 0]
        expected = np.log(beta) if variance == "fixed_large" else np.log(tab.posterior_variance[t])
        np.testing.assert_allclose(mapped, expected, rtol=1e-5)
        return
    x_t = np.sqrt(b(bar)) * x + np.sqrt(1 - b(bar)) * noise
    x0 = (x_t - np.sqrt(1 - b(bar)) * output) / np.sqrt(b(bar))
    gap = b(tab.posterior_mean_coef1[t]) * (x - x0)
    goal = np.log(b(tab.posterior_variance[t]))
    part = (np.tanh(noise) + 1) / 2
    ours = part * np.log(b(beta)) + (1 - part) * goal
    kl = 0.5 * (-1 + ours - goal + np.exp(goal - ours) + gap**2 * np.exp(-ours))
    np.testing.assert_allclose(terms["vb"], kl.mean((1, 2, 3, 4)) / np.log(2), rtol=1e-4)
    np.testing.assert_allclose(terms["loss_per_sample"], mse + kl.mean((1, 2, 3, 4)) / np.log(2), rtol=1e-4)


def test_the_bound_moves_the_variance_only(draws):
    x, noise, output = draws
    cfg, t = Config(loss="rescaled_mse", respacing="100"), jnp.array([50, 0])

    def bound(full):
        return iddpm.loss(lambda x, t: full, {"latents": x}, None, cfg, noise=noise, t=t)[1]["vb"].sum()

    full = jnp.concatenate([output, 0.1 * noise], -1)
    grad = jax.grad(bound)(full)
    assert not np.any(grad[..., :4]) and np.all(np.abs(grad[..., 4:]).max((1, 2, 3, 4)) > 0)
    plain = iddpm.loss(lambda x, t: full, {"latents": x}, None, replace(cfg, loss="mse"), noise=noise, t=t)[1]["vb"]
    np.testing.assert_allclose(bound(full), plain.sum() / 10, rtol=1e-5)
    whole = iddpm.loss(lambda x, t: full, {"latents": x}, None, replace(cfg, loss="rescaled_kl"), noise=noise, t=t)
    np.testing.assert_allclose(whole[1]["loss_per_sample"], plain * 100, rtol=1e-5)


def test_condition_frames_enter_at_step_zero_and_do_not_count(draws):
    x, noise, output = draws
    seen, x_mask = [], jnp.array([[True, False, True], [True, True, True]])

    def model_fn(x_t, t, x_mask):
        seen.append((x_t, t))
        return jnp.concatenate([output, output], -1)

    cfg = Config(respacing="10")
    batch = {"latents": x, "x_mask": x_mask}
    _, terms = iddpm.loss(model_fn, batch, None, cfg, noise=noise, t=jnp.array([9, 4]))
    x_t, t = seen[0]
    assert t.tolist() == [999, 444]
    np.testing.assert_allclose(x_t[0, 1], np.sqrt(1 - 1e-4) * x[0, 1] + 0.01 * noise[0, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(terms["mse"][0], np.square(output - noise)[0, [0, 2]].mean(), rtol=1e-5)


def test_bits_per_dimension_adds_up(draws):
    x, cfg = draws[0] / 3, Config(respacing="5")
    model_fn = lambda x, t: jnp.concatenate([0.9 * x, jnp.zeros_like(x)], -1)
    bits = iddpm.bits_per_dimension(model_fn, {"latents": x}, jax.random.key(0), cfg)
    assert bits["vb"].shape == (2, 5) and np.all(np.isfinite(bits["total"])) and np.all(bits["prior"] < 1e-3)
    np.testing.assert_allclose(bits["total"], bits["vb"].sum(1) + bits["prior"], rtol=1e-6)


def test_speed_draws_where_noise_grows_and_weighs_by_its_share():
    cfg = Config(speed=True, float32_tables=True)
    tab = tables(cfg)
    np.testing.assert_allclose(iddpm.speed_weights(cfg), 1 - tab.alphas_cumprod, rtol=1e-3)
    first, p = iddpm._speed(cfg)
    slope = np.gradient(np.sqrt(1 - np.cumprod(1 - iddpm.betas("linear", 1000))))
    assert first == np.argmax(slope < 5e-5) + 1 and abs(p.sum() - 1) < 1e-6
    np.testing.assert_allclose(p[np.argmax(slope < 9e-5) + 5] / p[0], 0.2, rtol=1e-4)
    assert iddpm.speed_steps(None, 5, cfg, draw=jnp.array([10, first + 5, 0])).tolist() == [
        10,
        first + 5,
        0,
        first - 10,
        5,
    ]
    t = iddpm.speed_steps(jax.random.key(0), 64, cfg)
    assert t.shape == (64,) and (t >= 0).all() and (t < 1000).all()
    _, terms = iddpm.loss(
        lambda x, t: jnp.zeros((*x.shape[:-1], 8)), {"latents": jnp.zeros(SHAPE)}, jax.random.key(0), cfg
    )
    assert np.isfinite(terms["loss_per_sample"]).all()
