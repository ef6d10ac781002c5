"""The one object that sample, serve, evaluate, train and notebooks use.

    pipe = Pipeline.from_pretrained("folder")            # or a training WORKDIR[@step], or a Hub id
    out = pipe("a red circle moving left", seed=7)
    out.frames                                           # uint8 [B, T, H, W, 3]

A folder holds model_index.json, denoiser/ vae/ text_encoder/ (config.json + safetensors under our names), tokenizer/
and scheduler.json. Sampling runs on whatever devices there are, sharded like training when a layout is given.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opensora_jax import __version__, locate
from opensora_jax.common.aspect import in_tables
from opensora_jax.common.errors import UserError
from opensora_jax.config import Part, build, part, to_plain
from opensora_jax.generator import CLIP_TOKENS, Generator, Request, SamplingConfig, check_asked, objective_of
from opensora_jax.parallel import runtime
from opensora_jax.parallel.shard import Layout, draw, put, shardings, to_host, use
from opensora_jax.system import System
from opensora_jax.weights import store
from opensora_jax.weights.engine import flatten, unflatten

__all__ = ["Output", "Pipeline", "SamplingConfig", "assemble", "objective_of"]

ROOMS = {"denoiser": "models", "vae": "vaes", "text_encoder": "text", "text_encoder_2": "text"}
INDEX = "model_index.json"


@dataclass(frozen=True)
class Output:
    frames: np.ndarray  # uint8 [B, T, H, W, 3]
    latents: np.ndarray
    seeds: list[int]
    fps: float


class Pipeline:
    def __init__(
        self, system: System, params: dict, sampling: SamplingConfig, tokenizer=None, layout: Layout | None = None,
        tokenizer_2=None,
    ):  # fmt: skip
        self.system, self.params, self.sampling, self.layout = system, params, sampling, layout
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
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
        tokenizers = (
            read_tokenizer(folder / "tokenizer", sampling.max_length),
            read_tokenizer(folder / "tokenizer_2", CLIP_TOKENS),
        )
        pipeline = cls(system, params, sampling, tokenizers[0], layout, tokenizers[1])
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
        pipeline = cls(assembly.system, params, assembly.sampling, assembly.tokenizer, layout, assembly.tokenizer_2)
        pipeline.source = f"{run.workdir}@{checkpoints.meta(run.step)['step']}"
        return pipeline

    def save_pretrained(self, folder, *, dtype: str | None = None) -> None:
        """Writes a whole pipeline folder; under its final name only when complete. Process 0 writes, all take part."""
        if jax.process_index() == 0:
            self._write(Path(folder), dtype)
        else:
            for name in self.system.parts:
                for array in flatten(self.params[name]).values():
                    to_host(array)
        runtime.barrier("export")

    def _write(self, folder: Path, dtype: str | None) -> None:
        if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).exists():
            raise UserError(f"{folder} exists and is no pipeline; choose an empty folder to export to")
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        for name, part_ in self.system.parts.items():
            flat = {path: _Whole(array) for path, array in flatten(self.params[name]).items()}
            store.save_params(partial_folder / name, flat, part_.describe(), dtype)
        for name, tokenizer in (("tokenizer", self.tokenizer), ("tokenizer_2", self.tokenizer_2)):
            if tokenizer is not None:
                tokenizer.save(partial_folder / name)
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
        """One video a (prompt, seed) pair; what it shows depends on its own pair alone. Settings: those of SamplingConfig
        (solver, steps, guidance_scale, num_frames, height, width, fps, loop, ...; None means the pipeline's own value) and
        of Request: image, video, references, condition, mask_strategy (docs/sample.md)."""
        request = {f.name: settings.pop(f.name, None) for f in fields(Request)}
        asked = {name: value for name, value in settings.items() if value is not None}
        unknown = set(asked) - {f.name for f in fields(SamplingConfig)}
        if unknown:
            raise UserError(f"unknown sampling settings: {', '.join(sorted(unknown))}")
        cfg = replace(self.sampling, **asked)
        check_sampling(cfg, self.system)
        check_asked(asked, self.system)
        if not prompts:
            raise UserError("there is no prompt; say what the video should show")
        shots, kind = Request(**request).shots(prompts, seeds, (cfg.height, cfg.width))
        with use(self.layout) if self.layout is not None else nullcontext():
            frames, latents = self._generator(self.params, shots, kind, cfg, negative_prompt, callback)
        return Output(frames, latents, list(seeds), cfg.fps)

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.system, self.tokenizer, self.tokenizer_2)


@dataclass(frozen=True)
class Assembly:
    """What a run's configuration describes: the system, where its frozen weights lie, and what it trains."""

    system: System
    trained: str  # "denoiser" or "vae"
    weights: dict[str, Any]  # part → a weights folder, or a seed for random ones
    sampling: SamplingConfig
    tokenizer: Any
    tokenizer_2: Any = None

    def frozen(self, layout: Layout | None = None) -> dict:
        """Parameters of every part that is not trained."""
        loaded = {}
        for name, network in self.system.networks.items():
            source = self.weights[name]
            if name == self.trained:
                continue
            if isinstance(source, int):
                where = shardings(network.abstract, network.axes, layout) if layout else None
                loaded[name] = draw(network, jax.random.key(source), where)
            else:
                loaded[name] = load_params(source, network, layout)
        return loaded


def assemble(cfg, dtype: str | None = None, *, weightless: bool = False) -> Assembly:
    """cfg: training.run.RunConfig. A part is described by its own section, or else by the pipeline folder, which also
    gives the weights of every part that names none. `weightless`: only shapes are wanted (a dry run), and a pipeline
    that is not on this machine is not missed."""
    base = (locate.here if weightless else locate.find)(cfg.pipeline) if cfg.pipeline else None
    if isinstance(base, locate.Run):
        raise UserError(f"config.pipeline={cfg.pipeline}: give a pipeline folder; export one with train --export=DIR")
    index = read_json(base / INDEX) if base else {"parts": {}}
    trained = "vae" if cfg.task == "vae" else "denoiser"
    parts, weights = {}, {}
    sections = {"denoiser": "model", "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    for name, section in sections.items():
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
    if weightless:
        return Assembly(System(**parts), trained, weights, sampling, None)
    tokenizer = _tokenizer(cfg.text.tokenizer, base, "tokenizer", cfg.text.max_length)
    second = _tokenizer(cfg.text.tokenizer_2, base, "tokenizer_2", CLIP_TOKENS) if "text_encoder_2" in parts else None
    return Assembly(System(**parts), trained, weights, sampling, tokenizer, second)


def _tokenizer(name: str, base, subfolder: str, max_length: int):
    """config.text.tokenizer: a folder, a repository, or a shipped pipeline's name; else the tokenizer of the pipeline."""
    if not name:
        return read_tokenizer(base / subfolder, max_length) if base else None
    from opensora_jax.text.tokenizers import load_tokenizer

    shipped = locate.ASSETS / name / "tokenizer"
    return load_tokenizer(shipped if shipped.is_dir() else name, max_length)


def check_sampling(cfg: SamplingConfig, system: System) -> None:
    if min(cfg.steps, cfg.num_frames, cfg.height, cfg.width, cfg.loop) < 1:
        raise UserError("steps, frames, height, width and loop must be at least 1")
    down = math.prod(system.latent_size(1, 512, 512)[1:])
    factor = round((512 * 512 / down) ** 0.5)
    padded = "y_vec" not in system.takes  # MMDiT's patches are not
    factor *= 1 if padded else system.denoiser.config.patch_size
    whole = cfg.height % factor == 0 and cfg.width % factor == 0
    if not whole and not (padded and in_tables(cfg.height, cfg.width)):
        fit = lambda n: max(factor, round(n / factor) * factor)
        raise UserError(
            f"{cfg.height}x{cfg.width} does not fit: height and width must be multiples of {factor} for this pipeline; "
            f"nearest: {fit(cfg.height)}x{fit(cfg.width)}"
        )


class _Whole:
    """An array that comes to this host when it is written, and not before."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return to_host(self.array)


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
    place = lambda path, leaf: put(reader.read(path).astype(leaf.dtype), where.get(path))
    return unflatten({path: place(path, leaf) for path, leaf in wanted.items()})


def read_tokenizer(folder: Path, max_length: int):
    if not folder.is_dir():
        return None
    from opensora_jax.text.tokenizers import load_tokenizer

    return load_tokenizer(folder, max_length)


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
