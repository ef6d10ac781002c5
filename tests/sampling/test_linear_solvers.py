"""DPM-Solver++, PNDM, DEIS and the other table solvers: they reach the exact answer of a process one can solve by hand.

Live agreement with diffusers, call for call, is in tests/parity/test_diffusers_schedulers.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion.iddpm import betas
from opensora_jax.sampling import dpm_solver
from opensora_jax.sampling.diffusers import NAMES, scheduler
from opensora_jax.sampling.linear import Linear, Table

MEAN, SPREAD = 0.1, 0.2
BARS = {
    "usual": np.cumprod(1 - betas("linear", 1000)),
    "narrow": np.cumprod(1 - betas("linear", 1000, 0.00085, 0.012)),
}


def best(bar):
    """The noise prediction of a network that knows the data to be normal (0.1, 0.2); times may fall between steps."""
    log_bar = jnp.asarray(np.log(bar), jnp.float32)

    def predict(x, t):
        a = jnp.exp(jnp.interp(t, jnp.arange(1000.0), log_bar)).reshape(-1, 1, 1, 1, 1)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * SPREAD**2 + 1 - a)

    return predict


def run(solver, predict, z, key=None):
    times = solver.schedule(z.shape)

    @jax.jit
    def step(state, i):
        return solver.step(predict, state, i, times)

    state = solver.init(z, key=key)
    for i in range(solver.steps):
        state = step(state, i)
    return np.asarray(state.latents)


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_sample_the_data(name):
    bar = BARS["narrow" if name in ("HeunDiscrete", "KDPM2AncestralDiscrete") else "usual"]
    z = jax.random.normal(jax.random.key(0), (64, 2, 2, 2, 2))
    steps = 200
    solver = scheduler(name, steps)
    assert solver.steps == steps + {"PNDM": 9, "HeunDiscrete": 199, "KDPM2AncestralDiscrete": 199}.get(name, 0)
    out = run(solver, best(bar), z, jax.random.key(1))
    if np.any(solver.table.noise):
        assert abs(out.mean() - MEAN) < 0.03 and abs(out.std() - SPREAD) < 0.04
    else:  # the flow maps each noise to its own quantile of the data
        np.testing.assert_allclose(out, MEAN + SPREAD * np.asarray(z), atol=0.05)


def error(solver, bar):
    z = jnp.linspace(-1.5, 1.5, 16).reshape(1, 1, 4, 4, 1)
    return np.abs(run(solver, best(bar), z) - (MEAN + SPREAD * np.asarray(z))).max()


def test_the_second_order_pays():
    bar = BARS["usual"]
    first, second = (error(dpm_solver.open_sora(40, order=order, spacing="logSNR"), bar) for order in (1, 2))
    assert second < first / 5
    assert error(dpm_solver.open_sora(100), bar) < 0.03


def test_the_last_step_of_dpm_solver_is_lower_below_ten_steps_and_always_in_1_3():
    past = lambda *args, **kw: dpm_solver.open_sora(*args, **kw).table.past[:, 0]
    assert past(9)[-1] == 0 and past(10)[-1] != 0 and past(10, always_lower=True)[-1] == 0 and past(10)[0] == 0
    times = dpm_solver.open_sora(4).table.t
    np.testing.assert_allclose(times, [999, 749.25, 499.5, 249.75], rtol=1e-6)
    for spacing in ("logSNR", "time_quadratic"):
        uneven = dpm_solver.open_sora(4, spacing=spacing).table.t
        assert abs(uneven[0] - 999) < 1e-2 and np.ptp(np.diff(uneven)) > 50


def test_a_table_says_what_a_step_does():
    table = Table.of(
        [5.0, 3.0],
        slots=1,
        input_scale=0.5,
        m_x=2.0,
        m_out=-1.0,
        keep=[1.0, 0.0],
        anchored=[0.0, 1.0],
        now=0.25,
        raw=3.0,
        past=[[0.0], [10.0]],
        anchors=[True, False],
        write=0,
        noise=[0.0, 1.0],
        init_scale=4.0,
    )
    solver, fed = Linear(table), []
    predict = lambda x, t: fed.append((float(x[0, 0, 0, 0, 0]), float(t[0]))) or jnp.full_like(x, 7.0)
    state = solver.init(jnp.ones((1, 1, 1, 1, 1)))
    state = solver.step(predict, state, 0, table.t, noise=jnp.ones(1))
    m0 = 2 * 4 - 7
    x1 = 4 + 0.25 * m0 + 3 * 7
    assert state.latents.item() == x1
    state = solver.step(predict, state, 1, table.t, noise=jnp.ones(1))
    m1 = 2 * x1 - 7
    assert state.latents.item() == 4 + 0.25 * m1 + 3 * 7 + 10 * m0 + 1
    assert fed == [(2.0, 5.0), (x1 / 2, 3.0)]
    with pytest.raises(TypeError, match="future"):
        Table.of([1.0], future=1.0)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="KDPM2AncestralDiscrete"):
        scheduler("UniPC", 10)
    with pytest.raises(UserError, match="at least 4"):
        scheduler("PNDM", 3)
    with pytest.raises(UserError, match="2 to 1000"):
        scheduler("DDIM", 1)
    with pytest.raises(UserError, match="logSNR"):
        dpm_solver.open_sora(10, spacing="karras")
    with pytest.raises(UserError, match="order 3"):
        dpm_solver.open_sora(10, order=3)
