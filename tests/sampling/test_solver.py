"""Naming solvers, and the two loops: the same sample from the host and from inside a program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import iddpm, rectified_flow
from opensora_jax.sampling.ddim import DDIM, Ancestral
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.sampling.solver import make, sample, scan

SHAPE = (2, 3, 2, 2, 4)
SIZES = {"height": np.full(2, 240.0), "width": np.full(2, 426.0), "num_frames": np.full(2, 51.0)}


def denoise(params, x, t, text, x_mask=None):
    out = jnp.tanh(params * x) + text
    out = out if x_mask is None else out * x_mask[:, :, None, None, None]
    return jnp.concatenate([out, jnp.zeros_like(out)], -1)


@pytest.fixture(scope="module")
def setting():
    text = jnp.linspace(-1, 1, 8).reshape(2, 1, 1, 1, 4)
    return (
        jnp.float32(0.7),
        ({"text": text}, {"text": jnp.zeros_like(text)}),
        jax.random.normal(jax.random.key(0), SHAPE),
    )


@pytest.mark.parametrize("name", ["", "ddpm", "dpm_solver", "PNDM"])
def test_host_and_device_loops_agree(setting, name):
    params, conditions, noise = setting
    solver = make(iddpm.V1_1 if name else rectified_flow.V1_2, 5, name)
    guidance, key, told = Guidance(3.0), jax.random.key(1), []
    once = sample(
        solver, guidance, denoise, params, conditions, noise, sizes=SIZES, key=key, on_step=lambda *at: told.append(at)
    )
    assert told == [(i + 1, solver.steps) for i in range(solver.steps)]

    @jax.jit
    def whole(params, noise):
        predict = partial(guidance, partial(denoise, params), conditions)
        return scan(solver, predict, solver.init(noise, key=key), solver.schedule(SHAPE, SIZES)).latents

    np.testing.assert_allclose(once, whole(params, noise), rtol=2e-4, atol=2e-4)
    assert np.isfinite(noise).all()  # the caller's noise was not donated


def test_masks_go_through_the_loop(setting):
    params, conditions, noise = setting
    mask = jnp.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    out = sample(
        make(rectified_flow.Config(), 3),
        Guidance(),
        denoise,
        params,
        conditions,
        noise,
        key=jax.random.key(1),
        mask=mask,
    )
    np.testing.assert_array_equal(out[0, 0], noise[0, 0])
    assert np.abs(out[0, 1] - noise[0, 1]).max() > 1e-2


def test_solvers_follow_the_objective():
    euler = make(rectified_flow.V2_0, 50, shift=None)
    assert euler == Euler(50, num_timesteps=1, toward_data=False)
    assert make(rectified_flow.V1_2, 30).shift is rectified_flow.V1_2.time.shift
    assert isinstance(make(iddpm.V1_0, 100), Ancestral) and make(iddpm.V1_0, 100).steps == 100
    assert make(iddpm.V1_0, 50, "ddim", eta=0.3) == DDIM(
        iddpm.Config(respacing="50", dropout=iddpm.V1_0.dropout), eta=0.3
    )
    with pytest.raises(UserError, match="choose euler"):
        make(rectified_flow.V1_2, 10, "ddim")
    with pytest.raises(UserError, match="does not fit a network trained as IDDPM"):
        make(iddpm.V1_0, 10, "euler")
    with pytest.raises(UserError, match="unknown solver 'heun'"):
        make(iddpm.V1_0, 10, "heun")
    with pytest.raises(UserError, match="solver ddim: "):
        make(iddpm.V1_0, 10, "ddim", speed=2)
