"""Live: our ten schedulers step for step against diffusers', default-constructed, on one toy network and one noise."""

import jax
import numpy as np
import pytest

from opensora_jax.sampling.diffusers import NAMES, scheduler

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SHAPE = (1, 2, 3, 3, 4)


@pytest.mark.parametrize("steps", [8, 21])
@pytest.mark.parametrize("name", NAMES)
def test_trajectories_agree(name, steps, monkeypatch):
    draws = np.random.default_rng(0).normal(size=(80, *SHAPE)).astype(np.float32)
    theirs = getattr(diffusers, f"{name}Scheduler")()
    theirs.set_timesteps(steps)
    taken = iter(draws[1:])
    used = []

    def randn(shape, **_):
        used.append(next(taken))
        return torch.from_numpy(used[-1])

    module = __import__(type(theirs).__module__, fromlist=["x"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", randn)

    def network(x, t, cos, tanh):
        return 0.8 * tanh(x) + 0.3 * cos(t / 100)

    ours = scheduler(name, steps)
    state, times = ours.init(jax.numpy.asarray(draws[0])), ours.schedule(SHAPE)
    predict = lambda x, t: network(x, t.reshape(-1, 1, 1, 1, 1), jax.numpy.cos, jax.numpy.tanh)
    step = jax.jit(lambda state, i, noise: ours.step(predict, state, i, times, noise=noise))

    x = torch.from_numpy(draws[0]) * theirs.init_noise_sigma
    assert len(theirs.timesteps) == ours.steps
    np.testing.assert_allclose(times, theirs.timesteps.numpy(), rtol=1e-5, atol=2e-2)
    for i, t in enumerate(theirs.timesteps):
        drawn = len(used)
        out = network(theirs.scale_model_input(x, t), t, torch.cos, torch.tanh)
        x = theirs.step(out, t, x).prev_sample
        noise = used[drawn] if len(used) > drawn else np.zeros(SHAPE, np.float32)
        state = step(state, i, noise)
        scale = float(x.abs().max())
        np.testing.assert_allclose(state.latents, x.numpy(), rtol=2e-4, atol=2e-4 * scale, err_msg=f"call {i}")
