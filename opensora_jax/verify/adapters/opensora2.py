"""Open-Sora 2.0 around its network: schedules, conditions, packing, denoising, sampling from noise, training."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common.packing import latent_size, pack, position_ids, unpack
from opensora_jax.diffusion import conditions
from opensora_jax.diffusion import rectified_flow as rf
from opensora_jax.diffusion.timesteps import TimeSampling, TokenShift, euler_schedule, sample_time, shift_time
from opensora_jax.sampling.euler import Euler
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.verify.case import Adapter, Case, channels_first, channels_last
from opensora_jax.weights import engine, mmdit


def sampling(case: Case, run: str) -> dict:
    """The helpers: a run's arguments or names say which one it exercises."""
    args, given = case.args(run), case.tensors(run)
    if "n_prompts" in args:
        return prepared(args, given)
    if "cond" in args:
        z = channels_last(given["z"])
        mask, latents = conditions.place(z.shape, args["cond"], references(given, len(z)), causal=args["causal"])
        return {"masks": channels_first(mask), "masked_ref": channels_first(latents)}
    if args["kind"] == "osc":
        guidance = Guidance(args["g"], oscillate_text=True, full_steps=args["force_num"])
        return {"gs": np.array([guidance.scales(i, 1)[0] for i in range(args["n"])])}
    if args["kind"] == "time_shift":
        return {"t": shift_time(given["t"], args["alpha"])}
    if args["kind"] == "schedule":
        kw = args["kw"]
        shape = (1, kw["num_frames"], 1, kw["image_seq_len"], 1)
        base, top = kw.get("base_shift", 1), kw.get("max_shift", 3)
        shift = TokenShift(1, kw.get("shift_alpha"), (256, base), (4096, top)) if kw.get("shift", True) else None
        return {"timesteps": euler_schedule(kw["num_steps"], 1, 1, shift=shift, shape=shape)[:, 0]}
    batch, channels, frames, height, width = args["latent_shape"]
    shape, shift = (batch, frames, height, width, channels), TokenShift()
    t = sample_time(None, shape, TimeSampling("logit-normal", shift=shift), {}, 1, draw=given["normal"])
    return {"t": t, "shift_alpha": shift.ratio({}, shape)}


def references(given: dict, batch: int) -> list:
    """ref{sample}_{number}, each [C, T', H, W], as lists of [T', H, W, C]."""
    refs: list = [None] * batch
    for name in sorted(name for name in given if name.startswith("ref")):
        b = int(name[3:].partition("_")[0])
        refs[b] = [*(refs[b] or []), np.moveaxis(given[name], 0, -1)]
    return refs


def prepared(args: dict, given: dict) -> dict:
    z, prompts, patch = channels_last(given["z"]), args["n_prompts"], args["patch_size"]
    z = jnp.asarray(np.concatenate([z] * (prompts // len(z))))
    packed = pack(z, patch)
    pixels = dict(pixels_per_token=args["D"], patch=patch)
    size = latent_size(4 * z.shape[1] - 3, args["H"], args["W"], **pixels)
    txt = np.broadcast_to(given["t5_out"], (prompts, *given["t5_out"].shape[1:]))
    return {
        "img": packed,
        "img_ids": position_ids(prompts, z.shape[1:4], patch),
        "txt": txt,
        "txt_ids": np.zeros((*txt.shape[:2], 3), np.float32),
        "y_vec": np.broadcast_to(given["clip_out"], (prompts, given["clip_out"].shape[1])),
        "unpacked": channels_first(unpack(packed, size, patch)),
    }


def network(case: Case):
    net, params, cfg = case.load("models", "mmdit")
    call = jax.jit(lambda arrays: net(params, **arrays))
    return lambda x, t, **named: call({"x": x, "t": t, **named}), cfg


def solve(case: Case, solver: Euler, guidance: Guidance, z, given: dict, cond, *, exact: bool) -> tuple:
    """Latents [B, T, H, W, C], the times, and packed inputs and predictions of every call. exact: no call of a branch
    that cannot matter, as we sample; else the reference's three."""
    model_fn, cfg = network(case)
    batch, fed, predicted = len(z), [], []
    part = lambda name, k: jnp.asarray(given[name][k * batch : (k + 1) * batch])
    three = len(given["t5_out"]) == 3 * batch  # a distilled network has no branches
    named = [{"y": part("t5_out", k), "y_vec": part("clip_out", k)} for k in range(3 if three else 1)]
    if cfg.guidance_embed:
        named = [{**n, "guidance": jnp.full(batch, guidance.scale, jnp.float32)} for n in named]
    if cfg.cond_embed and cond is not None:
        named = [{**n, "cond": jnp.zeros_like(cond) if k == 2 else cond} for k, n in enumerate(named)]

    def watched(x, t, **conditioning):
        out = model_fn(x, t, **conditioning)
        fed.append(pack(x, cfg.patch_size))
        predicted.append(pack(out, cfg.patch_size))
        return out

    if exact and three and all(np.array_equal(named[1][name], named[2][name]) for name in named[1]):
        named = named[:2]
    times, state = solver.schedule(z.shape), solver.init(z)
    for i in range(solver.steps):
        needed = guidance.branches(i, len(named)) if exact else len(named)
        predict = lambda x, t, i=i, n=needed: guidance(watched, tuple(named), x, t, i, branches=n)
        state = solver.step(predict, state, i, times)
    return state.latents, times[:, 0], fed, predicted


def guided(args: dict, steps: int, kind: str) -> Guidance:
    """The reference's scales; "i2v" conditions also vary the image scale over frames and steps."""
    ramp = {"image_floor": 1.0, "ramp_steps": steps + 1} if args["scale_temporal_osci"] and "i2v" in kind else {}
    return Guidance(
        args["guidance"],
        args.get("guidance_img") or 1.0,
        oscillate_text=args["text_osci"],
        oscillate_image=args["image_osci"],
        **ramp,
    )


def denoise(case: Case, run: str) -> dict:
    args, given = case.args(run), case.tensors(run)
    z, steps = jnp.asarray(channels_last(given["z"])), args["num_steps"]
    distilled = args["method"] == "distill"
    cond = None
    if "masks" in given:
        cond = jnp.concatenate([channels_last(given["masks"]), channels_last(given["masked_ref"])], -1)
    # The recordings name the tokens of a frame and the frames; the solver finds them in the shape.
    solver = Euler(steps, num_timesteps=1, shift=TokenShift(args["patch_size"] ** 2), toward_data=False)
    guidance = Guidance(args["guidance"]) if distilled else guided(args, steps, args["cond"])
    latents, times, fed, predicted = solve(case, solver, guidance, z, given, cond, exact=False)
    outputs = {"latent_packed": pack(latents, args["patch_size"]), "timesteps": times}
    for name, seen in (("inter.step_inputs", fed), ("inter.step_preds", predicted)):
        full = case.recorded(run).get(name)
        if full is not None:
            outputs[name] = np.stack(seen[: len(case.outputs[full])])
    return outputs


def api(case: Case, run: str) -> dict:
    args, given = case.args(run), case.tensors(run)
    opt, kind = args["opt"], args["cond_type"]
    z = jnp.asarray(channels_last(given["init_noise"]))
    refs = [[np.moveaxis(given[name], 0, -1) for name in sorted(given) if name.startswith("ref_")] or None] * len(z)
    cond = jnp.concatenate(conditions.place(z.shape, kind, refs, causal=opt["is_causal_vae"]), -1)
    shift = TokenShift(case.config["patch_size"] ** 2, opt.get("flow_shift")) if opt.get("shift", True) else None
    solver = Euler(opt["num_steps"], num_timesteps=1, shift=shift, toward_data=False)
    guidance = Guidance(opt["guidance"]) if opt["method"] == "distill" else guided(opt, solver.steps, kind)
    latents, *_ = solve(case, solver, guidance, z, given, cond, exact=True)
    latents = channels_first(conditions.put_back(latents, kind, refs))[:, :, : opt["num_frames"]]
    if not opt["is_causal_vae"] and kind.startswith("i2v"):  # the still was repeated to fill a latent frame
        head, tail = (3 * bool(n) for n in conditions.given_frames(kind))
        latents = latents[:, :, head : latents.shape[2] - tail]
    return {"latent": latents}


def train(case: Case, run: str) -> dict:
    args, given = case.args(run), case.tensors(run)
    return training_conditions(args, given) if "causal" in args else training_loss(case, args, given)


def training_conditions(args: dict, given: dict) -> dict:
    """With the recording's autoencoder: means over 8x8 pixels and over four frames, the first alone when causal."""

    def encode(x):
        b, t, h, w, c = x.shape
        x = x.reshape(b, t, h // 8, 8, w // 8, 8, c).mean((3, 5))
        head = [x[:, :1].mean(1)] if args["causal"] else []
        rest = x[:, len(head) :]
        return jnp.stack(head + [rest[:, i : i + 4].mean(1) for i in range(0, rest.shape[1], 4)], 1)

    video = jnp.asarray(channels_last(given["x"]))
    frames = encode(video).shape[1]
    cfg = conditions.TrainingConditions(((args["cond"], 1.0),), args["causal"], pad=args["pad"])
    x0, cond = conditions.encode_with_conditions(video, encode, jnp.zeros(len(video), int), cfg, frames)
    return {"x0": channels_first(x0), "cond": channels_first(cond)}


def training_loss(case: Case, args: dict, given: dict) -> dict:
    net, params, cfg = case.load("models", "mmdit")
    patch = args["patch_size"]
    x0, cond = jnp.asarray(channels_last(given["x0"])), jnp.asarray(channels_last(given["cond"]))
    noise, t = unpack(jnp.asarray(given["x1_packed"]), x0.shape[1:4], patch), jnp.asarray(given["t"])
    batch = {"latents": x0, "y": given["t5_out"], "y_vec": given["clip_out"], "cond": cond}
    if args["mask_loss"]:
        masks = given["masks"] if "masks" in given else cond[..., 0]
        batch["frame_weights"] = conditions.frame_weights(jnp.asarray(masks)[:, :, 0, 0])

    def loss(params):
        seen = {}

        def model_fn(x, t, **named):
            seen["x_t"] = x
            seen["pred"] = net(params, x, t, **named)
            return seen["pred"]

        value, _ = rf.loss(model_fn, batch, None, rf.V2_0, noise=noise, t=t)
        return value, seen

    (value, seen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    outputs = {"loss": value, "x_t": pack(seen["x_t"], patch), "pred": pack(seen["pred"], patch)}
    outputs["v_t"] = pack(rf.target(x0, noise, rf.V2_0), patch)
    flat = {path: np.asarray(grad) for path, grad in engine.flatten(grads).items()}
    shapes = {path: grad.shape for path, grad in flat.items()}
    named = engine.reference_arrays(shapes, flat.__getitem__, mmdit.RULES)
    outputs |= {f"grad.{name}": grad for name, grad in named}
    outputs["grad_sq_norm"] = sum(np.vdot(grad, grad) for grad in flat.values())
    return outputs


FAMILIES = {
    "opensora2_sampling": Adapter("rectified_flow", sampling),
    "opensora2_denoise": Adapter("rectified_flow", denoise),
    "opensora2_api": Adapter("rectified_flow", api),
    "opensora2_train": Adapter("rectified_flow", train),
}
