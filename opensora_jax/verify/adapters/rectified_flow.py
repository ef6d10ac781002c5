"""Rectified flow of Open-Sora 1.2 and 1.3: timestep transforms, training losses and sampling trajectories."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import rectified_flow as rf
from opensora_jax.diffusion.conditions import GivenFrames
from opensora_jax.diffusion.timesteps import PixelShift, shift_time
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last

V1_2 = {"frames": "full_chunks"}
V1_3 = {"frames": "quarter", "scale_images": False}
SIZES = ("height", "width", "num_frames")


def timesteps(case: Case, run: str, version: dict) -> dict:
    row = case.data["rows"][int(run)]
    options = {{"scale": "scale", "scale_temporal": "temporal"}[k]: v for k, v in row["kwargs"].items()}
    sizes = {name: np.array([row[name]], np.float32) for name in SIZES}
    t = case.tensors(run)["t"]
    return {"t_new": shift_time(t / np.float32(1000), PixelShift(**version, **options).ratio(sizes)) * 1000}


def network(case: Case, stem: str):
    """The tiny denoiser as model_fn(x, t, **conditioning), compiled once."""
    net, params, _ = case.load("models", stem, config=case.config["model"])
    call = jax.jit(
        lambda arrays, mask_index: net(params, **arrays, **({"mask_index": mask_index} if mask_index else {})),
        static_argnums=1,
    )
    return lambda x, t, *, num_frames=None, mask_index=None, **named: call({"x": x, "t": t, **named}, mask_index)


def conditioning(given: dict) -> dict:
    named = {name: jnp.asarray(given[name]) for name in ("fps", *SIZES)}
    return named | {"y": jnp.asarray(given["y"][:, 0]), "text_mask": jnp.asarray(given["y_mask"])}


def loss(case: Case, run: str, *, stem: str, cfg: rf.Config) -> dict:
    given = case.tensors(run)
    x, noise, t = (jnp.asarray(v) for v in (channels_last(given["x_start"]), channels_last(given["noise"]), given["t"]))
    batch = {"latents": x, **conditioning(given)}
    if run.startswith("i2v"):
        # The recorded losses were made with given frames at half weight, which their config does not say.
        weight = case.config.get("x_cond_weight", 0.5)
        frames = tuple(case.args(run).get("mask_index", (0,)))
        batch = GivenFrames(weight=weight).apply(batch, frames, None, drop=run.removeprefix("i2v_drop_"))
    if run == "masked":
        batch["x_mask"] = jnp.asarray(given["mask"])
    weights, at = None, t
    if run.endswith("weighted"):  # the reference can index its weights with whole steps only, so it was given those
        weights, at = jnp.asarray(given["weights"]), jnp.floor(t)
    _, metrics = rf.loss(network(case, stem), batch, None, cfg, noise=noise, t=at, weights=weights)
    return {"loss": metrics["loss_per_sample"], "add_noise": channels_first(rf.add_noise(x, noise, t))}


def sample(case: Case, run: str, *, stem: str, version: dict) -> dict:
    """1.3's settings are all here; 1.2 has none of them, so its configs leave them at rest."""
    given, cfg = case.tensors(run), case.config
    scheduler, options = cfg["scheduler_kwargs"], cfg["sample_kwargs"]
    shift = PixelShift(**version)
    if stem == "stdit3_v13":
        shift = replace(
            shift, scale=scheduler.get("transform_scale", 1.0), temporal=scheduler.get("scale_temporal", True)
        )
    solver = Euler(
        cfg["num_sampling_steps"],
        scheduler.get("num_timesteps", 1000),
        shift=shift if cfg["use_timestep_transform"] else None,
        discrete=cfg["use_discrete_timesteps"],
    )
    oscillate = scheduler.get("use_oscillation_guidance", False)
    ramp = {}
    if scheduler.get("scale_image_weight"):
        ramp = {"image_floor": scheduler.get("initial_image_scale", 1.0), "ramp_steps": max(2, solver.steps)}
    z, conditions = jnp.asarray(channels_last(given["z"])), branches(given)
    guidance = Guidance(
        options.get("guidance_scale", cfg["cfg_scale"]),
        options.get("image_cfg_scale", cfg["cfg_scale"]),
        oscillate_text=options.get("use_oscillation_guidance_for_text", oscillate),
        oscillate_image=options.get("use_oscillation_guidance_for_image", oscillate),
        full_steps=scheduler.get("force_num", 10),
        rescale=0.7 if scheduler.get("use_flaw_fix") and len(conditions) == 2 else 0.0,
        **ramp,
    )
    reference = None
    if options.get("use_sdedit") and len(conditions) == 3:
        z_cond, frames = conditions[0]["cond"], jnp.asarray(given["z_cond_mask"][:, 0, :, 0, 0])
        reference = (z_cond, frames)
    noise = None if "noise" not in given else [channels_last(n) for n in given["noise"]]
    guided = partial(guidance, network(case, stem), conditions)
    mask = None if "mask" not in given else jnp.asarray(given["mask"])
    return trajectory(solver, guided, z, given, mask=mask, reference=reference, noise=noise)


def branches(given: dict) -> tuple[dict, ...]:
    """Full, without text, and where frames are given without both."""
    full = conditioning(given)
    null = {"y": jnp.broadcast_to(jnp.asarray(given["y_null"]), full["y"].shape)}
    if "y_neg" in given:
        negative = {"y": jnp.asarray(given["y_neg"][:, 0]), "text_mask": jnp.asarray(given["y_neg_mask"])}
    else:
        negative = null
    if not len(given.get("mask_index", ())):
        return full, full | negative
    cond, cond_mask = (jnp.asarray(channels_last(given[name])) for name in ("z_cond", "z_cond_mask"))
    full |= {"cond": cond * cond_mask, "cond_mask": cond_mask, "y_null": null["y"]}
    full["mask_index"] = tuple(int(frame) for frame in given["mask_index"])
    return full, full | negative, full | negative | {"cond": jnp.zeros_like(cond)}


def trajectory(solver: Euler, guided, z, given: dict, *, noise=None, **start) -> dict:
    """The solver's loop, with what each step fed the network."""
    fed = []
    times = solver.schedule(z.shape, {name: given[name] for name in SIZES})
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


def _version(version: str, stem: str, style: dict, cfg: rf.Config) -> dict:
    return {
        f"rflow_timesteps_{version}": Adapter("rectified_flow", partial(timesteps, version=style)),
        f"rflow_loss_{version}": Adapter("rectified_flow", partial(loss, stem=stem, cfg=cfg)),
        f"rflow_sample_{version}": Adapter("rectified_flow", partial(sample, stem=stem, version=style)),
    }


FAMILIES = _version("v12", "stdit3", V1_2, rf.V1_2) | _version("v13", "stdit3_v13", V1_3, rf.V1_3)
