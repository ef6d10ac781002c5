"""The rectified-flow objective against its float64 definition, with a network one can integrate by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import rectified_flow as rf

SHAPE = (2, 3, 4, 5, 4)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "latents": jnp.asarray(rng.normal(size=SHAPE), jnp.float32),
        "text_emb": jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32),
        "height": jnp.array([480.0, 240.0]),
        "width": jnp.array([854.0, 426.0]),
        "num_frames": jnp.array([51.0, 51.0]),
        "video": jnp.zeros(1),
    }


def network(x, t, *, text_emb, x_mask=None, drop_text=None, drop_vec=None, **sizes):
    """A velocity that depends on everything it is given, followed by sigma channels that must be ignored."""
    assert set(sizes) == {"height", "width", "num_frames"}
    v = 0.3 * x + (t / 1000).reshape(-1, 1, 1, 1, 1) + text_emb.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
    if x_mask is not None:
        v = v * jnp.where(x_mask, 1.0, 0.5)[:, :, None, None, None]
    return jnp.concatenate([v, 1e6 * jnp.ones_like(v)], -1)


@pytest.mark.parametrize("cfg", [rf.V1_2, rf.V2_0], ids=["v1_2", "v2_0"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_its_definition(batch, cfg, masked):
    rng = np.random.default_rng(1)
    noise, part = rng.normal(size=SHAPE), np.array([0.25, 0.8])
    if masked:
        batch = batch | {"x_mask": jnp.array([[True, False, True], [False, False, True]])}
    value, metrics = rf.loss(
        network, batch, None, cfg, noise=jnp.asarray(noise, jnp.float32), t=jnp.asarray(part * cfg.num_timesteps)
    )
    x, s = np.asarray(batch["latents"], np.float64), cfg.sigma_min
    p = part[:, None, None, None, None]
    x_t = (1 - p) * x + (1 - (1 - s) * (1 - p)) * noise
    scale = 1.0
    if masked:
        keep = np.asarray(batch["x_mask"])[:, :, None, None, None]
        x_t = np.where(keep, x_t, x + s * noise)
        scale = np.where(keep, 1.0, 0.5)
    v = (
        0.3 * x_t
        + p * cfg.num_timesteps / 1000
        + np.asarray(batch["text_emb"], np.float64).mean((1, 2))[:, None, None, None, None]
    )
    goal = x - noise if cfg.toward_data else (1 - s) * noise - x
    error = (v * scale - goal) ** 2
    if masked:
        expected = [error[b][np.asarray(batch["x_mask"])[b]].mean() for b in range(2)]
    else:
        expected = error.mean((1, 2, 3, 4))
    np.testing.assert_allclose(metrics["loss_per_sample"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


def test_the_true_velocity_has_no_loss(batch):
    def oracle(x_t, t, **_):
        """For constant data x: noise = (x_t - (1 - p) x) / p."""
        p = (t / 1000).reshape(-1, 1, 1, 1, 1)
        return batch["latents"] - (x_t - (1 - p) * batch["latents"]) / p

    value, metrics = jax.jit(lambda b, k: rf.loss(oracle, b, k, rf.V1_2))(batch, jax.random.key(3))
    assert value < 1e-6 and metrics["t"].shape == (2,)


def test_keys_decide_and_weights_weigh(batch):
    at = lambda key: rf.loss(network, batch, jax.random.key(key), rf.V1_2)[0]
    assert at(1) == at(1) and at(1) != at(2)
    plain = rf.loss(network, batch, jax.random.key(1), rf.V1_2)[1]
    weights = jnp.arange(1001.0)
    weighed = rf.loss(network, batch, jax.random.key(1), rf.V1_2, weights=weights)[1]
    np.testing.assert_allclose(weighed["loss_per_sample"], plain["loss_per_sample"] * np.floor(plain["t"]), rtol=1e-6)


def test_presets_draw_times_within_their_units(batch):
    for cfg in (rf.V1_2, rf.V1_3, rf.V2_0):
        t = rf.loss(network, batch, jax.random.key(5), cfg)[1]["t"]
        assert (t > 0).all() and (t < cfg.num_timesteps).all()
