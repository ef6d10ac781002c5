"""The one object that sample, serve, evaluate, train and notebooks use.

    pipe = Pipeline.from_pretrained("folder")            # or a training WORKDIR[@step], or a Hub id
    out = pipe("a red circle moving left", seed=7)
    out.frames                                           # uint8 [B, T, H, W, 3]

A folder holds model_index.json, denoiser/ vae/ text_encoder/ (config.json + safetensors under our names), tokenizer/
and scheduler.json. Sampling runs on whatever devices there are, sharded like training when a layout is given.
"""

import importlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax import __version__, locate
from opensora_jax.common.errors import UserError
from opensora_jax.config import Part, build, part, to_plain
from opensora_jax.parallel.shard import Layout, shardings, use
from opensora_jax.sampling.guidance import Guidance
from opensora_jax.sampling.solver import make
from opensora_jax.system import System
from opensora_jax.weights import store
from opensora_jax.weights.engine import flatten, unflatten

ROOMS = {"denoiser": "models", "vae": "vaes", "text_encoder": "text"}
INDEX = "model_index.json"


@dataclass(frozen=True)
class SamplingConfig:
    """What a pipeline samples with unless a call says otherwise; scheduler.json."""

    objective: dict = field(default_factory=lambda: {"name": "rectified_flow", "preset": "V1_2"})
    solver: str = ""  # one of sampling.solver.NAMES; none: what the objective is usually sampled with
    steps: int = 30
    guidance_scale: float = 7.0
    guided_channels: int = 0  # 0: all of the latents'; Open-Sora 1.0 guides 3 of 4
    num_frames: int = 51
    height: int = 240
    width: int = 426
    fps: float = 24.0
    max_length: int = 300
    clean_caption: bool = True  # the T5 caption cleaning that 1.x models were trained with


@dataclass(frozen=True)
class Output:
    frames: np.ndarray  # uint8 [B, T, H, W, 3]
    latents: np.ndarray
    seeds: list[int]
    fps: float


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
    return module, build(type(base), _shallow(base) | spec, "objective")


def _shallow(value) -> dict:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


class Pipeline:
    def __init__(
        self, system: System, params: dict, sampling: SamplingConfig, tokenizer=None, layout: Layout | None = None
    ):
        self.system, self.params, self.sampling, self.tokenizer, self.layout = (
            system,
            params,
            sampling,
            tokenizer,
            layout,
        )
        self.source = ""

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str, *, layout: Layout | None = None, dtype: str | None = None) -> "Pipeline":
        """A pipeline folder, a training WORKDIR[@step] (its EMA), or a Hub id. dtype: of computation, all parts."""
        folder = locate.find(source)
        if isinstance(folder, locate.Run):
            return cls.from_run(folder, layout=layout, dtype=dtype)
        index = read_json(folder / INDEX)
        system = System(**{name: read_part(folder, name, index, dtype) for name in ROOMS if name in index["parts"]})
        params = {name: load_params(folder / name, system.networks[name], layout) for name in system.parts}
        sampling = build(SamplingConfig, read_json(folder / "scheduler.json"), str(folder / "scheduler.json"))
        pipeline = cls(system, params, sampling, read_tokenizer(folder, sampling.max_length), layout)
        pipeline.source = str(source)
        return pipeline

    @classmethod
    def from_run(cls, run: locate.Run, *, layout: Layout | None = None, dtype: str | None = None) -> "Pipeline":
        """The EMA of a training run, with the other parts that it trained against."""
        from opensora_jax.training.checkpoint import Checkpoints
        from opensora_jax.training.run import RunConfig

        checkpoints = Checkpoints(run.workdir, read_only=True)
        cfg = build(RunConfig, checkpoints.meta(run.step)["config"], f"{run.workdir}: config")
        assembly = assemble(cfg, dtype)
        network = assembly.system.networks[assembly.trained]
        host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = (
            shardings(network.abstract, network.axes, layout)
            if layout
            else jax.tree.map(lambda _: host, network.abstract)
        )
        abstract = jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=to), network.abstract, where
        )
        params = assembly.frozen(layout) | {assembly.trained: checkpoints.restore_item("ema", abstract, run.step)}
        pipeline = cls(assembly.system, params, assembly.sampling, assembly.tokenizer, layout)
        pipeline.source = f"{run.workdir}@{checkpoints.meta(run.step)['step']}"
        return pipeline

    def save_pretrained(self, folder, *, dtype: str | None = None) -> None:
        """Writes a whole pipeline folder; under its final name only when complete."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).exists():
            raise UserError(f"{folder} exists and is no pipeline; choose an empty folder to export to")
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        for name, part_ in self.system.parts.items():
            flat = flatten(self.params[name])
            store.save_params(partial_folder / name, flat, part_.describe(), dtype)
        if self.tokenizer is not None:
            self.tokenizer.save(partial_folder / "tokenizer")
        write_json(partial_folder / "scheduler.json", to_plain(self.sampling))
        families = {name: part_.family for name, part_ in self.system.parts.items()}
        write_json(partial_folder / INDEX, {"library": "opensora_jax", "version": __version__, "parts": families})
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)

    # ---- sampling -----------------------------------------------------------------------------------------------

    def __call__(self, prompt: str | Sequence[str], *, num_samples: int = 1, seed: int = 0, **settings) -> Output:
        """Videos for one or several prompts; sample k of a prompt has seed + k. Settings are those of `generate`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [(text, seed + k) for text in prompts for k in range(num_samples)]
        return self.generate([text for text, _ in rows], [s for _, s in rows], **settings)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative_prompt: str | None = None,
        callback: Callable[[int, int], None] | None = None,
        **settings,
    ) -> Output:
        """One video a (prompt, seed) pair; what it shows depends on its own pair alone. Settings: solver, steps,
        guidance_scale, num_frames, height, width, fps; None means the pipeline's own value."""
        unknown = set(settings) - {field.name for field in fields(SamplingConfig)}
        if unknown:
            raise UserError(f"unknown sampling settings: {', '.join(sorted(unknown))}")
        cfg = replace(self.sampling, **{name: value for name, value in settings.items() if value is not None})
        check_sampling(cfg, self.system)
        if not prompts or not all(text.strip() for text in prompts):
            raise UserError("the prompt is empty; say what the video should show")
        with self._placed():
            latents = self._latents(list(zip(prompts, seeds)), negative_prompt, cfg, callback)
            frames = np.asarray(self._decode(self.params["vae"], latents, cfg.num_frames))
        return Output(frames, np.asarray(latents), list(seeds), cfg.fps)

    def _latents(self, rows, negative_prompt, cfg: SamplingConfig, callback):
        size = self.system.latent_size(cfg.num_frames, cfg.height, cfg.width)
        channels = self.system.denoiser.config.in_channels
        keys = [jax.random.key(s) for _, s in rows]
        noise = [jax.random.normal(key, (*size, channels), jnp.float32) for key in keys]
        batch = len(rows)
        full = lambda value: np.full((batch,), value, np.float32)
        sizes = {"height": full(cfg.height), "width": full(cfg.width), "num_frames": full(cfg.num_frames)}
        sizes["fps"] = full(cfg.fps if cfg.num_frames > 1 else 120.0)  # images are 120 frames a second, as trained

        tokens, mask = self.tokenizer(self._clean([text for text, _ in rows], cfg), cfg.max_length)
        text = self._encode_text(self.params["text_encoder"], tokens, mask)
        conditions = self.system.conditioning({"text_emb": text, "text_mask": mask} | sizes)
        if negative_prompt:
            tokens, null_mask = self.tokenizer(self._clean([negative_prompt] * batch, cfg), cfg.max_length)
            null = {"y": self._encode_text(self.params["text_encoder"], tokens, null_mask), "text_mask": null_mask}
            drop = False
        else:
            null, drop = {}, True  # the learned null caption, under the mask of the prompt, as trained
        flag = lambda value: np.full((batch,), value, bool)
        branches = (conditions | {"drop_text": flag(False)}, conditions | null | {"drop_text": flag(drop)})

        solver = make(objective_of(cfg.objective)[1], cfg.steps, cfg.solver)
        times = solver.schedule((batch, *size, channels), sizes)
        state = solver.init(jnp.stack(noise))
        settings = {"solver": solver, "channels": cfg.guided_channels or None}
        draws = jnp.stack(keys)
        for i in range(solver.steps):
            given = (self.params["denoiser"], state, branches, draws, times, np.int32(i), cfg.guidance_scale)
            state = self._step(*given, **settings)
            if callback is not None:
                jax.block_until_ready(state)
                callback(i + 1, solver.steps)
        return state.latents

    @cached_property
    def _step(self):
        @partial(jax.jit, donate_argnums=(1,), static_argnames=("solver", "channels"))
        def step(params, state, branches, keys, times, i, guidance_scale, *, solver, channels):
            model = lambda x, t, **given: self.system.denoise(params, x, t, **given)
            guide = Guidance(guidance_scale, channels=channels)
            # A sample's fresh noise comes from its own seed, so that it does not depend on its neighbours.
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, i + 1), state.latents.shape[1:])
            predict = lambda x, t, **extra: guide(model, branches, x, t, **extra)
            return solver.step(predict, state, i, times, noise=jax.vmap(draw)(keys))

        return step

    @cached_property
    def _encode_text(self):
        return jax.jit(self.system.encode_text)

    @cached_property
    def _decode(self):
        @partial(jax.jit, static_argnums=2)
        def decode(params, latents, frames):
            video = self.system.decode_video(params, latents, frames)
            return (jnp.clip((video + 1) / 2, 0, 1) * 255 + 0.5).astype(jnp.uint8)

        return decode

    def _clean(self, texts, cfg: SamplingConfig):
        if not cfg.clean_caption:
            return texts
        from opensora_jax.common.prompts import text_preprocessing

        return [text_preprocessing(text) for text in texts]

    def _placed(self):
        from contextlib import nullcontext

        return use(self.layout) if self.layout is not None else nullcontext()


@dataclass(frozen=True)
class Assembly:
    """What a run's configuration describes: the system, where its frozen weights lie, and what it trains."""

    system: System
    trained: str  # "denoiser" or "vae"
    weights: dict[str, Any]  # part → a weights folder, or a seed for random ones
    sampling: SamplingConfig
    tokenizer: Any

    def frozen(self, layout: Layout | None = None) -> dict:
        """Parameters of every part that is not trained."""
        loaded = {}
        for name, network in self.system.networks.items():
            source = self.weights[name]
            if name == self.trained:
                continue
            if isinstance(source, int):
                where = shardings(network.abstract, network.axes, layout) if layout else None
                loaded[name] = jax.jit(network.init, out_shardings=where)(jax.random.key(source))
            else:
                loaded[name] = load_params(source, network, layout)
        return loaded


def assemble(cfg, dtype: str | None = None, *, weightless: bool = False) -> Assembly:
    """cfg: training.run.RunConfig. A part is described by its own section, or else by the pipeline folder, which also
    gives the weights of every part that names none. `weightless`: only shapes are wanted (a dry run)."""
    base = locate.find(cfg.pipeline) if cfg.pipeline and not weightless else None
    if isinstance(base, locate.Run):
        raise UserError(f"config.pipeline={cfg.pipeline}: give a pipeline folder; export one with train --export=DIR")
    index = read_json(base / INDEX) if base else {"parts": {}}
    trained = "vae" if cfg.task == "vae" else "denoiser"
    parts, weights = {}, {}
    for name, section in (("denoiser", "model"), ("vae", "vae"), ("text_encoder", "text_encoder")):
        spec = dict(getattr(cfg, section))
        source = spec.pop("weights", "")
        if spec:
            parts[name] = part(ROOMS[name], spec | ({"dtype": dtype} if dtype else {}), f"config.{section}")
        elif name in index["parts"]:
            assert base is not None
            parts[name] = read_part(base, name, index, dtype)
        given = base / name if base and name in index["parts"] and (name != trained or not spec) else None
        weights[name] = cfg.seed + 1 if source == "random" else Path(source) if source else given
        if name in parts and name != trained and weights[name] is None and not weightless:
            raise UserError(f'config.{section}.weights is missing: a converted folder, or "random" for a trial run')
    known = read_json(base / "scheduler.json") if base else {}
    sampling = build(SamplingConfig, known | {"objective": cfg.objective} | cfg.sampling, "config.sampling")
    return Assembly(System(**parts), trained, weights, sampling, None if weightless else _tokenizer(cfg, base))


def _tokenizer(cfg, base):
    """config.text.tokenizer: a folder, a repository, or a shipped pipeline's name; else the tokenizer of the pipeline."""
    name = cfg.text.tokenizer
    if not name:
        return read_tokenizer(base, cfg.text.max_length) if base else None
    from opensora_jax.text.tokenizers import load_tokenizer

    shipped = locate.ASSETS / name / "tokenizer"
    return load_tokenizer(shipped if shipped.is_dir() else name, cfg.text.max_length)


def check_sampling(cfg: SamplingConfig, system: System) -> None:
    if min(cfg.steps, cfg.num_frames, cfg.height, cfg.width) < 1:
        raise UserError("steps, frames, height and width must be at least 1")
    down = math.prod(system.latent_size(1, 512, 512)[1:])
    factor = round((512 * 512 / down) ** 0.5)
    if cfg.height % factor or cfg.width % factor:
        fit = lambda n: max(factor, round(n / factor) * factor)
        raise UserError(
            f"{cfg.height}x{cfg.width} does not fit: height and width must be multiples of {factor} for this VAE; "
            f"nearest: {fit(cfg.height)}x{fit(cfg.width)}"
        )


def read_part(folder: Path, name: str, index: dict, dtype: str | None) -> Part:
    config = read_json(folder / name / "config.json")
    spec = config | {"family": index["parts"][name]} | ({"dtype": dtype} if dtype else {})
    return part(ROOMS[name], spec, f"{folder / name}/config.json:")


def load_params(folder: Path, network, layout: Layout | None = None) -> dict:
    """Weights of one part straight onto their devices: one host buffer a tensor, no replicated copy."""
    reader = store.Folder(folder)
    wanted = flatten(network.abstract)
    reader.check({path: leaf.shape for path, leaf in wanted.items()})
    where = flatten(shardings(network.abstract, network.axes, layout)) if layout else {}
    place = lambda path, leaf: jax.device_put(reader.read(path).astype(leaf.dtype), where.get(path))
    return unflatten({path: place(path, leaf) for path, leaf in wanted.items()})


def read_tokenizer(folder: Path, max_length: int):
    if not (folder / "tokenizer").is_dir():
        return None
    from opensora_jax.text.tokenizers import load_tokenizer

    return load_tokenizer(folder / "tokenizer", max_length)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a pipeline folder is written by `train --export` or `convert`") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
