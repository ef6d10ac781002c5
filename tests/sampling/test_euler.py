"""The Euler solver on flows with a known end, its frame masks, guidance, jit and determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion.timesteps import PixelShift
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance, stack

SHAPE = (2, 3, 2, 2, 4)


def run(solver, predict, z, times=None, **options):
    times = solver.schedule(z.shape) if times is None else times
    noise = options.pop("noise", None)
    state = solver.init(z, **options)
    for i in range(solver.steps):
        state = solver.step(predict, state, i, times, noise=None if noise is None else noise[i])
    return state.latents


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(6)]


@pytest.mark.parametrize("toward_data", [True, False])
def test_a_straight_flow_arrives_in_any_number_of_steps(draws, toward_data):
    z, goal = draws[:2]
    velocity = (goal - z) * (1 if toward_data else -1)
    for steps in (1, 4):
        solver = Euler(steps=steps, toward_data=toward_data)
        np.testing.assert_allclose(run(solver, lambda x, t: velocity, z), goal, atol=1e-5)


def test_steps_match_float64(draws):
    sizes = {
        "height": np.array([240.0, 720.0]),
        "width": np.array([426.0, 1280.0]),
        "num_frames": np.array([51.0, 51.0]),
    }
    solver = Euler(steps=5, shift=PixelShift())
    got = run(
        solver, lambda x, t: -0.5 * x + (t / 1000)[:, None, None, None, None], draws[0], solver.schedule(SHAPE, sizes)
    )
    x, ratio = np.asarray(draws[0], np.float64), np.sqrt(np.array([240 * 426, 720 * 1280]) / 512**2) * np.sqrt(15)
    bend = lambda t: ratio * t / (1 + (ratio - 1) * t)
    for i in range(5):
        t, dt = bend(1 - i / 5), bend(1 - i / 5) - bend(1 - (i + 1) / 5)
        x = x + (-0.5 * x + t[:, None, None, None, None]) * dt[:, None, None, None, None]
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def test_masked_frames_are_kept_edited_or_generated(draws):
    z, seen = draws[0], []
    mask = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.0, 0.26]])

    def predict(x, t, x_mask):
        seen.append((np.asarray(t[0]), np.asarray(x_mask), np.asarray(x)))
        return jnp.ones_like(x)

    got = np.asarray(run(Euler(steps=4), predict, z, mask=mask, noise=draws[1:5]))
    z, noise = np.asarray(z), np.asarray(draws[1:5])
    np.testing.assert_array_equal(got[0, 0], z[0, 0])
    np.testing.assert_array_equal(got[1, 1], z[1, 1])
    np.testing.assert_allclose(got[0, 2], z[0, 2] + 1, rtol=1e-5)
    joined = 0.5 * z[0, 1] + 0.5 * noise[2][0, 1]
    np.testing.assert_allclose(seen[2][2][0, 1], joined, rtol=1e-5)
    np.testing.assert_allclose(got[0, 1], joined + 0.5, rtol=1e-5)
    np.testing.assert_allclose(got[1, 2], 0.75 * z[1, 2] + 0.25 * noise[3][1, 2] + 0.25, rtol=1e-5)
    for t, x_mask, _ in seen:
        np.testing.assert_array_equal(x_mask, np.asarray(mask) * 1000 >= t)


def test_one_jitted_step_serves_the_loop_and_keys_decide(draws):
    solver, mask = Euler(steps=3), jnp.array([[0.0, 0.7, 1.0]] * 2)
    times = solver.schedule(SHAPE)
    traced = []

    def predict(x, t, x_mask):
        traced.append(1)
        return jnp.sin(x) * x_mask[:, :, None, None, None]

    step = jax.jit(lambda state, i: solver.step(predict, state, i, times))

    def sample(seed):
        state = solver.init(draws[0], key=jax.random.key(seed), mask=mask)
        for i in range(3):
            state = step(state, i)
        return np.asarray(state.latents)

    np.testing.assert_array_equal(sample(1), sample(1))
    assert len(traced) == 1
    assert np.abs(sample(1) - sample(2)).max() > 1e-3


def test_guidance_mixes_two_branches_of_one_call(draws):
    calls = []

    def model_fn(x, t, text_emb, x_mask, size):
        calls.append(x.shape)
        assert x_mask.shape[0] == x.shape[0] == t.shape[0] and size == 3
        v = x + text_emb[:, :1, :1, None, None]
        return jnp.concatenate([v, 2 * v], -1)

    z, t, x_mask = draws[0], jnp.full(2, 500.0), jnp.ones((2, 3), bool)
    conditions = {"text_emb": jnp.full((2, 1, 1), 3.0), "size": 3}, {"text_emb": jnp.zeros((2, 1, 1)), "size": 3}
    out = Guidance(7.0)(model_fn, conditions, z, t, x_mask=x_mask)
    assert calls == [(4, 3, 2, 2, 4)] and stack(conditions)["text_emb"].shape == (4, 1, 1)
    np.testing.assert_allclose(out[..., :4], z + 21.0, rtol=1e-6)
    np.testing.assert_allclose(out[..., 4:], 2 * (z + 3.0), rtol=1e-6)
    partial = Guidance(7.0, channels=3)(model_fn, conditions, z, t, x_mask=x_mask)
    np.testing.assert_allclose(partial[..., :3], z[..., :3] + 21.0, rtol=1e-6)
    np.testing.assert_allclose(partial[..., 3], z[..., 3] + 3.0, rtol=1e-6)
