"""Guidance scales of 1.3 and 2.0, and that fewer branches give the same sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance, open_sora_v2

SHAPE = (2, 3, 2, 2, 4)


def model_fn(x, t, text, image):
    model_fn.forwards += x.shape[0] // SHAPE[0]
    return jnp.tanh(x + text) * (1 + image) + t.reshape(-1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def conditions():
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(2, 1, 1, 1, 4)), jnp.float32)
    text, image, null = draw(), draw(), draw()
    return (
        {"text": text, "image": image},
        {"text": null, "image": image},
        {"text": null, "image": jnp.zeros_like(image)},
    )


def sample(guidance, conditions, z, steps, reduce):
    solver, model_fn.forwards = Euler(steps, num_timesteps=1, toward_data=False), 0
    times, state = solver.schedule(SHAPE), solver.init(z)
    for i in range(steps):
        branches = guidance.branches(i, len(conditions)) if reduce else None
        predict = lambda x, t, i=i, b=branches: guidance(model_fn, conditions, x, t, i, branches=b)
        state = solver.step(predict, state, i, times)
    return state.latents, model_fn.forwards


def test_the_exact_schedule_of_text_to_video_takes_80_forwards_instead_of_150(conditions):
    z = jax.random.normal(jax.random.key(0), SHAPE)
    guidance = open_sora_v2(50, image=False)
    nothing = tuple({**c, "image": jnp.zeros_like(c["image"])} for c in conditions)
    reference, forwards = sample(guidance, nothing, z, 50, reduce=False)
    exact, fewer = sample(guidance, nothing[:2], z, 50, reduce=True)
    assert (forwards, fewer) == (150, 80)
    np.testing.assert_allclose(exact, reference, atol=1e-5)


def test_image_to_video_takes_110(conditions):
    z = jax.random.normal(jax.random.key(1), SHAPE)
    guidance = open_sora_v2(50, image=True)
    reference, forwards = sample(guidance, conditions, z, 50, reduce=False)
    exact, fewer = sample(guidance, conditions, z, 50, reduce=True)
    assert (forwards, fewer) == (150, 110)
    np.testing.assert_allclose(exact, reference, atol=1e-5)
    literal = open_sora_v2(50, image=True, exact=False)
    assert {literal.branches(i, 3) for i in range(50)} == {3}


def test_three_branches_mix_as_defined(conditions):
    x, t = jax.random.normal(jax.random.key(2), SHAPE), jnp.full(2, 0.5)
    c, u, n = (np.asarray(model_fn(x, t, **k), np.float64) for k in conditions)
    got = Guidance(7.5, 3.0)(model_fn, conditions, x, t)
    np.testing.assert_allclose(got, n + 3.0 * (u - n) + 7.5 * (c - u), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(Guidance()(model_fn, conditions[:1], x, t), c, rtol=1e-5, atol=1e-5)


def test_oscillation_and_ramps():
    guidance = open_sora_v2(20, image=True)
    assert [guidance.scales(i, 3)[0] for i in (0, 9, 10, 11, 12, 13)] == [7.5, 7.5, 7.5, 1.0, 7.5, 1.0]
    np.testing.assert_allclose(guidance.scales(0, 3)[1], [1, 2, 3])
    np.testing.assert_allclose(guidance.scales(10, 3)[1], [1, 1.5, 2])
    np.testing.assert_allclose(guidance.scales(11, 3)[1], [1, 1, 1])
    for i in (0, 10, 11, 19):
        traced = jax.jit(lambda i: guidance.scales(i, 3))(i)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            traced,
            tuple(map(np.asarray, guidance.scales(i, 3))),
        )
    v13 = Guidance(7.5, 5.0, image_floor=2.0, ramp_steps=20)
    np.testing.assert_allclose(v13.scales(19, 2)[1], [2, 2], rtol=1e-6)
    assert Guidance(image_scale=1.5, image_floor=2.0, ramp_steps=20).scales(0, 2)[1] == 1.5
    with pytest.raises(UserError, match="ramp_steps"):
        Guidance(image_floor=1.0)


def test_rescaling_brings_the_spread_back(conditions):
    x, t = jax.random.normal(jax.random.key(3), SHAPE), jnp.full(2, 0.5)
    c, u = (np.asarray(model_fn(x, t, **k), np.float64) for k in conditions[:2])
    mixed = u + 7.0 * (c - u)
    std = lambda v: v.reshape(2, -1).std(1, ddof=1).reshape(2, 1, 1, 1, 1)
    got = Guidance(7.0, rescale=0.7)(model_fn, conditions[:2], x, t)
    np.testing.assert_allclose(got, mixed * (0.7 * std(c) / std(mixed) + 0.3), rtol=1e-4, atol=1e-5)
