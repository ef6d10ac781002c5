"""From prompts and references to frames, clip by clip and step by step: what Pipeline runs.

Which frames a network is given, and how, is in sampling/given.py; how its branches mix, in sampling/guidance.py.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.common import prompts
from opensora_jax.common.errors import UserError
from opensora_jax.config import build
from opensora_jax.data.references import references
from opensora_jax.diffusion import rectified_flow
from opensora_jax.diffusion.timesteps import TokenShift
from opensora_jax.sampling import given
from opensora_jax.sampling.ddim import Ancestral
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.sampling.solver import Solver, make
from opensora_jax.system import System

CLIP_TOKENS = 77
LOOP = 1 << 20  # far from any step's number, which a sample's key is folded with too


@dataclass(frozen=True)
class SamplingConfig:
    """What a pipeline samples with unless a call says otherwise; scheduler.json."""

    objective: dict = field(default_factory=lambda: {"name": "rectified_flow", "preset": "V1_2"})
    solver: str = ""  # one of sampling.solver.NAMES; none: what the objective is usually sampled with
    steps: int = 30
    guidance_scale: float = 7.0
    guided_channels: int = 0  # 0: all of the latents'; Open-Sora 1.0 guides 3 of 4
    image_guidance_scale: float = 3.0  # of given frames, where they are a branch of their own (1.3, 2.0)
    oscillate_text: bool = False  # after ten steps every odd step is taken without guidance
    oscillate_image: bool = False
    image_floor: float | None = None  # the image scale grows from here over the frames and sinks to here over the steps
    guidance_rescale: float = 0.0  # of text alone: towards the spread of the unguided prediction (1.3: 0.7)
    num_frames: int = 51
    height: int = 240
    width: int = 426
    fps: float = 24.0
    max_length: int = 300
    scores: dict = field(default_factory=dict)  # put behind every prompt: arguments of common.prompts.append_scores
    clean_caption: bool = True  # the T5 caption cleaning that 1.x models were trained with
    loop: int = 1  # clips of a long video
    condition_frame_length: int = 5  # latent frames that a clip takes over from the one before
    condition_frame_edit: float = 0.0  # 0: as they are; up to 1: made anew
    hold_given_frames: bool = False  # 1.3: set the given frames anew at every step (its use_sdedit)


@dataclass(frozen=True)
class Shot:
    """One video to make."""

    prompt: str
    seed: int
    references: tuple = ()  # pixels [T, H, W, 3] in [-1, 1]
    strategy: str = ""


@dataclass(frozen=True)
class Request:
    """Frames to be given, as users say it: files (several in one string are separated by ;) or uint8 arrays."""

    image: Any = None
    video: Any = None
    references: Any = None
    condition: str | None = None  # one of diffusion.conditions.KINDS; none: what the references look like
    mask_strategy: str | None = None  # Open-Sora 1.1 to 1.3: diffusion/mask_strategy.py

    def shots(self, texts: Sequence[str], seeds: Sequence[int], size: tuple[int, int]) -> tuple[list[Shot], str]:
        """The videos to make, and the one condition that they share. A prompt's JSON suffix speaks for itself alone."""
        common = [part for source in (self.image, self.video, self.references) for part in references(source, size)]
        shots, kinds = [], set()
        for prompt, seed in zip(texts, seeds, strict=True):
            text, own = prompts.split_json(prompt)
            if not text.strip():
                raise UserError("the prompt is empty; say what the video should show")
            parts = references(own["reference_path"], size) if "reference_path" in own else common
            strategy = own.get("mask_strategy", self.mask_strategy or "")
            if strategy and self.condition:
                raise UserError("condition and mask_strategy exclude each other: both say which frames are given")
            kinds.add("" if strategy else given.kind_of(self.condition or "", parts))
            shots.append(Shot(text, seed, tuple(parts), strategy))
        if len(kinds - {""}) > 1:
            raise UserError(f"the references of one call ask for different conditions: {', '.join(sorted(kinds))}")
        return shots, next(iter(kinds - {""}), "")


def objective_of(spec: dict) -> tuple[Any, Any]:
    """{"name": "rectified_flow", "preset": "V1_2", ...fields} → the module in diffusion/ and its Config."""
    spec = dict(spec)
    name, preset = spec.pop("name", "rectified_flow"), spec.pop("preset", None)
    try:
        module = importlib.import_module(f"opensora_jax.diffusion.{name}")
    except ModuleNotFoundError:
        raise UserError(f"objective.name={name!r} is unknown; choose rectified_flow or iddpm") from None
    base = getattr(module, preset, None) if preset else module.Config()
    if base is None:
        raise UserError(f"objective.preset={preset!r} is not in diffusion/{name}.py")
    shallow = {name: getattr(base, name) for name in base.__dataclass_fields__}
    return module, build(type(base), shallow | spec, "objective")


class Generator:
    """Compiled once for each shape; parameters come with every call."""

    def __init__(self, system: System, tokenizer, tokenizer_2=None):
        self.system, self.tokenizer, self.tokenizer_2 = system, tokenizer, tokenizer_2

    def __call__(
        self, params: dict, shots: list[Shot], kind: str, cfg: SamplingConfig, negative_prompt: str | None,
        callback: Callable[[int, int], None] | None = None,
    ):  # fmt: skip
        """uint8 frames [B, T, H, W, 3] and latents of every shot; `kind`: what their references give."""
        batch = len(shots)
        full = lambda value: np.full((batch,), value, np.float32)
        sizes = {"height": full(cfg.height), "width": full(cfg.width), "num_frames": full(cfg.num_frames)}
        sizes["fps"] = full(cfg.fps if cfg.num_frames > 1 else prompts.IMAGE_FPS)
        size = (*self.system.latent_size(cfg.num_frames, cfg.height, cfg.width), self.system.latent_channels)
        texts = [self._texts(shot.prompt, cfg) for shot in shots]
        film = self._film(params, shots, kind, cfg)
        solver = self._solver(cfg)
        guidance = _guidance(cfg, film, kind, solver.steps)
        for loop in range(cfg.loop):
            keys = [jax.random.key(shot.seed) for shot in shots]
            keys = [jax.random.fold_in(key, LOOP + loop) for key in keys] if loop else keys
            start = film.start(loop, np.stack([jax.random.normal(key, size, jnp.float32) for key in keys]))
            said = self._text(params, [text[loop] for text in texts], cfg) | sizes
            branches = self._branches(params, said, start, cfg, negative_prompt)
            tell = callback and (lambda i, loop=loop: callback(loop * solver.steps + i, cfg.loop * solver.steps))
            film.add(self._solve(params, solver, start, branches, jnp.stack(keys), sizes, guidance, tell))
        frames = np.clip((film.pixels() + 1) / 2, 0, 1) * 255 + 0.5
        return frames.astype(np.uint8), film.latents()

    # ---- what is said -------------------------------------------------------------------------------------------

    def _texts(self, prompt: str, cfg: SamplingConfig) -> list[str]:
        """What the prompt says in every clip."""
        _, loops = prompts.split_prompt(prompt)
        if loops and loops[-1] >= cfg.loop:
            raise UserError(
                f"the prompt speaks of clip {loops[-1]}, but loop={cfg.loop} makes clips 0 to {cfg.loop - 1}"
            )
        texts = [prompts.prompt_for_loop(prompt, loop).strip() for loop in range(cfg.loop)]
        if cfg.scores:
            try:
                texts = [prompts.append_scores(text, **cfg.scores) for text in texts]
            except TypeError as error:
                raise UserError(f"scores={cfg.scores}: {error}") from None
        return [prompts.text_preprocessing(text) for text in texts] if cfg.clean_caption else texts

    def _text(self, params: dict, texts: list[str], cfg: SamplingConfig) -> dict:
        tokens, mask = self.tokenizer(texts, cfg.max_length)
        said = {"text_emb": self._encode_text(params["text_encoder"], tokens, mask), "text_mask": mask}
        if self.tokenizer_2 is not None:
            tokens, _ = self.tokenizer_2(texts, CLIP_TOKENS)
            said["y_vec"] = self._encode_pooled(params["text_encoder_2"], tokens)
        return said

    def _branches(self, params, said: dict, start: given.Start, cfg: SamplingConfig, negative_prompt) -> tuple:
        """The network's arguments: in full, without text, and where frames are given without these too."""
        full = self.system.conditioning(said) | start.arguments
        count = len(said["height"])
        if "guidance" in self.system.takes:  # distilled: the scale is an argument, and there is nothing to mix
            if negative_prompt:
                raise UserError("this network has its guidance distilled into it and takes no negative prompt")
            return (full | {"guidance": np.full((count,), cfg.guidance_scale, np.float32)},)
        flag = lambda value: {"drop_text": np.full((count,), value, bool)} if self.system.learned_null else {}
        if negative_prompt or not self.system.learned_null:
            clean = prompts.text_preprocessing if cfg.clean_caption else lambda text: text
            null = self._text(params, [clean(negative_prompt or "")] * count, cfg)
            null = self.system.conditioning(said | null) | flag(False)
        else:
            null = flag(True)  # the learned null caption, under the mask of the prompt, as trained
        without_text = full | flag(False) | null
        branches = (full | flag(False), without_text)
        return (*branches, without_text | start.without_image) if start.without_image else branches

    # ---- what is given ------------------------------------------------------------------------------------------

    def _film(self, params: dict, shots: list[Shot], kind: str, cfg: SamplingConfig):
        """The way of giving frames that fits the network, or plain clips."""
        pixels, strategies = [list(shot.references) for shot in shots], tuple(shot.strategy for shot in shots)
        masked = any(strategies)
        way = given.way_of(self.system.takes, masked=masked)
        wanted = masked or kind or cfg.loop > 1
        if wanted and way is None:
            family = self.system.denoiser.family
            what = "no mask strategy: give condition=i2v_head or the like" if masked else "no images, videos or loops"
            raise UserError(f"this pipeline's network ({family}) takes {what}")
        codec = self._codec(params["vae"])
        if wanted and way is not given.Channels:
            check_wanted(cfg, self.system.latent_size(cfg.num_frames, cfg.height, cfg.width)[0], codec.chunk)
        script = given.Script(
            kind, strategies, cfg.num_frames, cfg.loop, cfg.condition_frame_length, cfg.condition_frame_edit,
            cfg.hold_given_frames,
        )  # fmt: skip
        return (way or given.Masks)(codec, script, pixels)

    def _codec(self, params) -> given.Codec:
        latents_of = lambda frames: self.system.latent_size(frames, 512, 512)[0]
        micro = getattr(getattr(self.system.vae, "config", None), "micro_frame_size", None)
        return given.Codec(
            encode=lambda video: np.asarray(self._encode(params, video[None])[0]),
            decode=lambda latents, frames: self._decode(params, jnp.asarray(latents), frames),
            latents_of=latents_of,
            frames_of=lambda latents: self.system.frames_of(latents),
            chunk=latents_of(micro) if micro else None,
        )

    # ---- steps --------------------------------------------------------------------------------------------------

    def _solver(self, cfg: SamplingConfig) -> Solver:
        objective, options = objective_of(cfg.objective)[1], {}
        patch = getattr(self.system.denoiser.config, "patch_size", None)
        if isinstance(objective, rectified_flow.Config) and isinstance(objective.time.shift, TokenShift):
            options["shift"] = replace(objective.time.shift, tokens_per_patch=patch**2)  # training counts four for all
        return make(objective, cfg.steps, cfg.solver, **options)

    def _solve(self, params, solver, start: given.Start, branches, keys, sizes, guidance, tell):
        shape, options = start.latents.shape, {"mask": start.mask, "reference": start.held}
        options = {name: jax.tree.map(jnp.asarray, value) for name, value in options.items() if value is not None}
        times = solver.schedule(shape, sizes)
        try:
            state = jax.tree.map(jnp.copy, solver.init(jnp.asarray(start.latents), **options))  # steps donate it
        except TypeError:
            raise UserError("this solver keeps no frames: choose euler for a rectified flow, ddpm or ddim") from None
        settings = {"solver": solver, "frames": start.frames}
        settings["guidance"] = Guidance(channels=guidance.channels, rescale=guidance.rescale)  # scales come by step
        for i in range(solver.steps):
            needed = branches[: guidance.branches(i, len(branches))]
            text, image = guidance.scales(i, shape[1])
            scales = np.float32(text), np.broadcast_to(np.asarray(image, np.float32), shape[1])
            state = self._step(params["denoiser"], state, needed, keys, times, np.int32(i), scales, **settings)
            if tell is not None:
                jax.block_until_ready(state)
                tell(i + 1)
        return state.latents

    @cached_property
    def _step(self):
        @partial(jax.jit, donate_argnums=(1,), static_argnames=("solver", "guidance", "frames"))
        def step(params, state, branches, keys, times, i, scales, *, solver, guidance, frames):
            model = lambda x, t, **arguments: self.system.denoise(params, x, t, **arguments)
            told = {"mask_index": frames} if frames else {}
            # A sample's fresh noise comes from its own seed, so that it does not depend on its neighbours.
            draw = lambda key, n: jax.random.normal(jax.random.fold_in(key, n), state.latents.shape[1:])
            noise = jax.vmap(draw, (0, None))(keys, i + 1)
            if isinstance(solver, Ancestral) and state.mask is not None:  # one for frames that join, one for the step
                noise = (jax.vmap(draw, (0, None))(keys, LOOP // 2 + i), noise)
            predict = lambda x, t, **extra: guidance(model, branches, x, t, scales=scales, **told, **extra)
            return solver.step(predict, state, i, times, noise=noise)

        return step

    @cached_property
    def _encode_text(self):
        return jax.jit(self.system.encode_text)

    @cached_property
    def _encode_pooled(self):
        return jax.jit(self.system.encode_pooled)

    @cached_property
    def _encode(self):
        return jax.jit(lambda params, video: self.system.encode_video(params, video))

    @cached_property
    def _decode(self):
        return jax.jit(self.system.decode_video, static_argnums=2)


def _guidance(cfg: SamplingConfig, film, kind: str, steps: int) -> Guidance:
    floor = cfg.image_floor
    if isinstance(film, given.Channels) and not kind.startswith("i2v"):
        floor = None
    return Guidance(
        cfg.guidance_scale,
        cfg.image_guidance_scale,
        channels=cfg.guided_channels or None,
        oscillate_text=cfg.oscillate_text,
        oscillate_image=cfg.oscillate_image,
        image_floor=floor,
        ramp_steps=max(2, steps + film.shrinks),
        rescale=0.0 if isinstance(film, given.Embedders) and kind else cfg.guidance_rescale,
    )


def check_asked(asked: Iterable[str], system: System) -> None:
    """What a call asks for by name is something that the network takes."""
    needs = {
        "image_guidance_scale": {"cond"}, "oscillate_image": {"cond"}, "image_floor": {"cond"},
        "hold_given_frames": {"cond_mask"}, "condition_frame_length": {"x_mask"}, "condition_frame_edit": {"x_mask"},
    }  # fmt: skip
    for name in asked:
        if not needs.get(name, set()) <= system.takes:
            raise UserError(f"{name} means nothing to this pipeline's network ({system.denoiser.family}); leave it out")


def check_wanted(cfg: SamplingConfig, latent_frames: int, chunk: int | None) -> None:
    """Frames that are given, or a video of several clips, fit the size of a clip."""
    carry = cfg.condition_frame_length
    if cfg.num_frames == 1:
        raise UserError("a still cannot be given frames or made in loops; num_frames must be larger than 1")
    if carry < 1 or (chunk and carry % chunk):
        unit = f"a multiple of {chunk}, the latent frames that this VAE makes together" if chunk else "at least 1"
        raise UserError(f"condition_frame_length={carry} must be {unit}")
    if cfg.loop > 1 and carry >= latent_frames:
        raise UserError(
            f"condition_frame_length={carry} leaves nothing to make: a clip of {cfg.num_frames} frames has "
            f"{latent_frames} latent frames; take fewer, or more frames"
        )
