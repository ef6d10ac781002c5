"""IDDPM of Open-Sora 1.0 and 1.1 and of Open-Sora-Plan: tables, losses, sampling trajectories; DPM-Solver of 1.0."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import iddpm
from opensora_jax.sampling import dpm_solver
from opensora_jax.sampling.ddim import DDIM, Ancestral
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

NAMED = ("fps", "height", "width", "num_frames", "ar")


def process(options: dict, *, float32: bool) -> iddpm.Config:
    """The reference's constructor arguments as ours."""
    variance = "learned_range"
    if not options.get("learn_sigma", True):
        variance = "fixed_small" if options.get("sigma_small") else "fixed_large"
    kind = "rescaled_mse" if options.get("rescale_learned_sigmas") else "mse"
    respacing = options.get("respacing", options.get("timestep_respacing", options.get("num_sampling_steps", "")))
    return iddpm.Config(
        schedule=options.get("noise_schedule", "linear"),
        diffusion_steps=options.get("diffusion_steps", 1000),
        respacing=",".join(map(str, respacing)) if isinstance(respacing, list) else str(respacing or ""),
        predict="x0" if options.get("predict_xstart") else "noise",
        variance=variance,
        loss="rescaled_kl" if options.get("use_kl") else kind,
        float32_tables=float32,
    )


def tables(case: Case, run: str, *, float32: bool) -> dict:
    """A run is named after its respacing, of those in the config."""
    spell = lambda respacing: re.sub(r"\W+", "_", str(respacing)).strip("_") or "full"
    stated = case.config.get("timestep_respacing")
    known = {spell(r): r for r in stated} if isinstance(stated, list) else {}
    options = {**case.config, "timestep_respacing": known.get(spell(run), "" if run == "full" else run)}
    tab = iddpm.tables(process(options, float32=float32))
    return {name: getattr(tab, name) for name in case.recorded(run)}


def loss(case: Case, run: str, *, float32: bool) -> dict:
    given = case.tensors(run)
    cfg = process(case.config.get(run) or {}, float32=float32)
    output = jnp.asarray(channels_last(given["model_output"]))
    batch = {"latents": jnp.asarray(channels_last(given["x_start"]))}
    if "mask" in given:
        batch["x_mask"] = jnp.asarray(given["mask"])
    noise, t = jnp.asarray(channels_last(given["noise"])), jnp.asarray(given["t"])
    weights = jnp.asarray(given["weights"]) if "weights" in given else None
    _, terms = iddpm.loss(lambda x, t, **_: output, batch, None, cfg, noise=noise, t=t, weights=weights)
    return {"loss": terms["loss_per_sample"], **{k: v for k, v in terms.items() if k in ("mse", "vb")}}


def guided(case: Case, stem: str, channels: int | None):
    """The tiny denoiser under classifier-free guidance, and the noise to start from."""
    given, cfg = case.tensors(next(iter(case.runs))), case.config
    net, params, _ = case.load("models", stem, config=cfg["model"])
    call = jax.jit(lambda x, t, y, text_mask, **named: net(params, x, t, y, text_mask=text_mask, **named))
    full = {name: jnp.asarray(given[name]) for name in NAMED if name in given}
    full |= {"y": jnp.asarray(given["y"][:, 0]), "text_mask": jnp.asarray(given["y_mask"])}
    null = full | {"y": jnp.broadcast_to(jnp.asarray(given["y_null"]), full["y"].shape)}
    guidance = Guidance(cfg["cfg_scale"], channels=cfg.get("cfg_channel") or channels)
    predict = partial(guidance, lambda x, t, **named: call(x, t, **named), (full, null))
    return predict, jnp.asarray(channels_last(given["z"]))


def sample(case: Case, run: str, *, stem: str, channels: int | None, float32: bool) -> dict:
    given = case.tensors(run)
    predict, z = guided(case, stem, channels)
    solver = Ancestral(process(case.config, float32=float32))
    # The reference also draws for the unconditional half, and throws that half away.
    noise = [jnp.asarray(channels_last(n[: len(z)])) for n in given["noise"]]
    if "mask" in given:
        noise = list(zip(noise[::2], noise[1::2]))
    state = solver.init(z, mask=None if "mask" not in given else jnp.asarray(given["mask"]))
    times, trajectory = solver.schedule(z.shape), []
    for i in range(solver.steps):
        state = solver.step(predict, state, i, times, noise=noise[i])
        trajectory.append(channels_first(state.latents))
    return {"samples": trajectory[-1], "first_step": trajectory[0], "trajectory": np.stack(trajectory)}


def dpm(case: Case, run: str, *, stem: str, always_lower: bool = False) -> dict:
    predict, z = guided(case, stem, None)
    solver = dpm_solver.open_sora(case.config["num_sampling_steps"], always_lower=always_lower)
    times, state = solver.schedule(z.shape), solver.init(z)
    for i in range(solver.steps):
        state = solver.step(predict, state, i, times)
    return {"samples": channels_first(state.latents)}


def plan(case: Case, run: str) -> dict:
    """Open-Sora-Plan: everything at once, on a toy network given by a formula."""
    args, given = case.args(run), case.tensors(run)
    axis = 1 if args.get("t2v", True) else 2
    last = lambda x: jnp.asarray(np.moveaxis(np.asarray(x), axis, -1))
    first = lambda x: np.moveaxis(np.asarray(x), -1, axis)
    cfg = process(args, float32=False)
    tab = iddpm.tables(cfg)

    def model_fn(x, t, **_):
        t = t.reshape(-1, 1, 1, 1, 1)
        parts = [0.7 * x + 0.1 * jnp.cos(t / 100), jnp.tanh(0.5 * x) + 0.01 * t / 1000]
        return jnp.concatenate(parts if cfg.learned else parts[:1], -1)

    x, noise, t = last(given["x"]), last(given["noise"]), jnp.asarray(given["t"])
    p = iddpm.p_mean_variance(model_fn(x, jnp.asarray(tab.timestep_map)[t]), x, t, cfg)
    _, terms = iddpm.loss(model_fn, {"latents": x}, None, cfg, noise=noise, t=t)
    outputs = {
        "q_sample": first(iddpm.q_sample(x, t, noise, cfg)),
        "pmv.mean": first(p["mean"]),
        "pmv.log_variance": first(p["log_variance"]),
        "pmv.variance": first(jnp.exp(p["log_variance"])),
        "pmv.pred_xstart": first(p["x0"]),
        "loss.loss": terms["loss_per_sample"],
        **{f"loss.{name}": terms[name] for name in ("mse", "vb") if name in terms},
    }
    strided = lambda table: table[::37] if len(table) > 64 else table
    for name in case.recorded(run):
        if name == "timestep_map" or name.startswith("tab."):
            outputs[name] = strided(getattr(tab, name.removeprefix("tab.")))
        if "_sample_loop" in name:
            eta = float(name.partition("_eta")[2] or 0)
            solver = Ancestral(cfg) if name.startswith("p_") else DDIM(cfg, eta=eta)
            state, times = solver.init(noise), solver.schedule(noise.shape)
            for i in range(solver.steps):
                state = solver.step(model_fn, state, i, times, noise=last(given["step_noise"][i]))
            outputs[name] = first(state.latents)
    return outputs


def _version(version: str, stem: str, channels: int | None, float32: bool) -> dict:
    return {
        f"iddpm_tables_{version}": Adapter("iddpm", partial(tables, float32=float32)),
        f"iddpm_loss_{version}": Adapter("iddpm", partial(loss, float32=float32)),
        f"iddpm_sample_{version}": Adapter("iddpm", partial(sample, stem=stem, channels=channels, float32=float32)),
    }


FAMILIES = {
    **_version("v10", "stdit", 3, False),
    **_version("v11", "stdit2", None, True),
    "dpm_solver_sample_v10": Adapter("dpm_solver", partial(dpm, stem="stdit")),
    "dpm_solver_sample_v11": Adapter("dpm_solver", partial(dpm, stem="stdit2")),
    "osp_diffusion": Adapter("iddpm", plan),
}
