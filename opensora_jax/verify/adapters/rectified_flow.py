"""Rectified flow of Open-Sora 1.2: timestep transforms, training losses and sampling trajectories."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import rectified_flow as rf
from opensora_jax.diffusion.timesteps import PixelShift, shift_time
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

V1_2 = {"frames": "chunks"}
V1_3 = {"frames": "quarter", "scale_images": False}
SIZES = ("height", "width", "num_frames")


def timesteps(case: Case, run: str, version: dict) -> dict:
    row = case.data["rows"][int(run)]
    options = {{"scale": "scale", "scale_temporal": "temporal"}[k]: v for k, v in row["kwargs"].items()}
    sizes = {name: np.array([row[name]], np.float32) for name in SIZES}
    t = case.tensors(run)["t"]
    return {"t_new": shift_time(t / np.float32(1000), PixelShift(**version, **options).ratio(sizes)) * 1000}


def network(case: Case):
    """The tiny denoiser as model_fn(x, t, **conditioning), compiled once."""
    net, params, _ = case.load("models", "stdit3", config=case.config["model"])
    call = jax.jit(lambda x, t, y, text_mask, **named: net(params, x, t, y, text_mask=text_mask, **named))
    return lambda x, t, *, num_frames=None, **named: call(x, t, **named)


def conditioning(given: dict) -> dict:
    named = {name: jnp.asarray(given[name]) for name in ("fps", *SIZES)}
    return named | {"y": jnp.asarray(given["y"][:, 0]), "text_mask": jnp.asarray(given["y_mask"])}


def loss(case: Case, run: str) -> dict:
    given = case.tensors(run)
    x, noise, t = (jnp.asarray(v) for v in (channels_last(given["x_start"]), channels_last(given["noise"]), given["t"]))
    batch = {"latents": x, **conditioning(given)}
    if run == "masked":
        batch["x_mask"] = jnp.asarray(given["mask"])
    weights, at = None, t
    if run == "weighted":  # the reference can index its weights with whole steps only, so it was given those
        weights, at = jnp.asarray(given["weights"]), jnp.floor(t)
    _, metrics = rf.loss(network(case), batch, None, rf.V1_2, noise=noise, t=at, weights=weights)
    return {"loss": metrics["loss_per_sample"], "add_noise": channels_first(rf.add_noise(x, noise, t))}


def sample(case: Case, run: str) -> dict:
    given, cfg = case.tensors(run), case.config
    solver = Euler(
        cfg["num_sampling_steps"],
        shift=PixelShift(**V1_2) if cfg["use_timestep_transform"] else None,
        discrete=cfg["use_discrete_timesteps"],
    )
    z, full = jnp.asarray(channels_last(given["z"])), conditioning(given)
    null = full | {"y": jnp.broadcast_to(jnp.asarray(given["y_null"]), full["y"].shape)}
    noise = None if "noise" not in given else [channels_last(n) for n in given["noise"]]
    guided = partial(Guidance(cfg["cfg_scale"]), network(case), (full, null))
    return trajectory(solver, guided, z, given, mask=given.get("mask"), noise=noise)


def trajectory(solver: Euler, guided, z, given: dict, *, noise=None, **start) -> dict:
    """The solver's loop, with what each step fed the network."""
    fed = []
    times = solver.schedule(z.shape, {name: given[name] for name in SIZES})
    start = {name: None if value is None else jnp.asarray(value) for name, value in start.items()}
    state = solver.init(z, **start)
    before = []
    for i in range(solver.steps):

        def predict(x, t, i=i, **extra):
            fed.append((channels_first(x), np.asarray(t)))
            return guided(x, t, i, **extra)

        before.append(channels_first(state.latents))
        state = solver.step(predict, state, i, times, noise=None if noise is None else jnp.asarray(noise[i]))
    return {
        "samples": channels_first(state.latents),
        "timesteps": np.stack([t for _, t in fed]),
        "z_before_step1": before[1],
        "z_inputs": np.stack([x for x, _ in fed]),
    }


FAMILIES = {
    "rflow_timesteps_v12": Adapter("rectified_flow", partial(timesteps, version=V1_2)),
    "rflow_timesteps_v13": Adapter("rectified_flow", partial(timesteps, version=V1_3)),
    "rflow_loss_v12": Adapter("rectified_flow", loss),
    "rflow_sample_v12": Adapter("rectified_flow", sample),
}
