"""What train.py's page calls: the run's network, its compiled step, captions to tokens, samples and exports.

Everything here follows from the configuration; nothing here loops.
"""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax import captions, locate
from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.config import part, to_plain
from opensora_jax.diffusion.conditions import GivenFrames, TrainingConditions
from opensora_jax.generator import CLIP_TOKENS
from opensora_jax.parallel.shard import Layout, draw, place_batch, rows_of_process, shardings
from opensora_jax.pipeline import Assembly, Pipeline, load_params, objective_of, read_json
from opensora_jax.training import optimizer
from opensora_jax.training.checkpoint import Checkpoints
from opensora_jax.training.run import RunConfig
from opensora_jax.training.step import StepConfig, make_step
from opensora_jax.work import forward_flops

CONSUMED = (
    "video", "latents", "text_emb", "text_mask", "y_vec", "x_mask", "noisy", "fps", "height", "width", "num_frames",
)  # fmt: skip


class Trainer:
    def __init__(self, cfg: RunConfig, assembly: Assembly, layout: Layout):
        self.cfg, self.assembly, self.layout = cfg, assembly, layout
        self.system = assembly.system
        self.network = self.system.networks.get(assembly.trained)  # encode has none

    def trained_network(self):
        if self.network is None:
            section = "vae" if self.assembly.trained == "vae" else "model"
            raise UserError(f"config.{section} is empty; name a family, e.g. config.model.family=stdit3")
        return self.network

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def initial_weights(self):
        """The reader that the init ladder calls for `init_from`, or for a part that came with the pipeline."""
        source = self.cfg.init_from or self.assembly.weights[self.assembly.trained]
        return None if not source or isinstance(source, int) else lambda: (self._read(source), source)

    def _read(self, source) -> dict:
        if not self.cfg.init_from:
            return load_params(source, self.network, self.layout)
        into = self.cfg.init_into
        if not into:
            return self._read_into(self.network)
        if into not in self.network.abstract:
            raise UserError(f"config.init_into={into}: the network has only {', '.join(self.network.abstract)}")
        where = shardings(self.network.abstract, self.network.axes, self.layout)
        params = draw(self.network, jax.random.key(self.cfg.seed), where)
        return params | {into: self._read_into(self.network.part(into))}

    def _read_into(self, network) -> dict:
        """The weights of init_from for a network, or for a part of one."""
        found = locate.find(self.cfg.init_from)
        if isinstance(found, locate.Run):
            where = shardings(network.abstract, network.axes, self.layout)
            abstract = jax.tree.map(
                lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), network.abstract, where
            )
            return Checkpoints(found.workdir, read_only=True).restore_item("ema", abstract, found.step)
        return load_params(found / self.assembly.trained, network, self.layout)

    def meta(self) -> dict:
        return {"config": to_plain(self.cfg), "seed": self.cfg.seed}

    # ---- data -----------------------------------------------------------------------------------------------------

    def data_config(self, *, whole: bool = False):
        """The loader's configuration, with what follows from the VAE and the mesh; `whole`: no clip is left out."""
        data = replace(self.cfg.data, batch_scale=self.cfg.data.batch_scale * self.data_shards)
        if whole:
            data = replace(data, drop_last=False, allow_starving=True)
        if self.system.vae is None:
            return data
        stride = 17 / self.system.latent_size(17, 512, 512)[0]
        chunk = getattr(self.system.vae.config, "micro_frame_size", None) or 0
        shared = int(getattr(self.system.vae.config, "temporal_overlap", False)) if chunk else 0
        return replace(data, time_stride=math.ceil(stride), time_chunk_frames=chunk, time_overlap_frames=shared)

    @property
    def data_shards(self) -> int:
        """Bucket tables count samples a device group, as the references' do; the mesh multiplies them."""
        return math.prod(self.layout.sizes[axis] for axis in self.layout.axes_of("batch"))

    def check_cursor(self, loader, cursor: dict | None) -> None:
        if cursor is not None:
            loader.check_position(cursor)

    def needs_frozen(self, loader) -> bool:
        latents = loader.latents
        if self.assembly.trained == "vae":
            return False
        if latents and isinstance(self.given, TrainingConditions):
            raise UserError("config.conditions.kinds needs pixels: latents of a clip have seen later frames")
        if latents and any(name.endswith("_noisy") for name in self.cfg.data.mask_types or ()):
            raise UserError("noisy kinds of data.mask_types need pixels: noise is added to the frames before encoding")
        absent = [name for name in self.encoders if name not in self.system.parts]
        if not latents and absent:
            raise UserError(
                f"the data holds pixels and captions, but the run has no {' and no '.join(absent)}: name config.pipeline, "
                "or train on latents written by python -m opensora_jax.encode"
            )
        return not latents or bool(self.cfg.log.sample_every_steps)

    @property
    def encoders(self) -> tuple[str, ...]:
        """What a denoiser needs beside itself to train on pixels and captions."""
        return ("vae", "text_encoder") if self._reads_text else ("vae",)

    @cached_property
    def _reads_text(self) -> bool:
        """Not a network of classes, or of nothing at all."""
        return self.system.denoiser is None or ("y" in self.system.takes and not captions.classes(self.system))

    def null_text(self, frozen: dict) -> dict:
        """{"null": features of an empty prompt}, for networks whose dropped captions become that."""
        system, length = self.system, self.cfg.text.max_length
        if self.assembly.trained == "vae" or not self.cfg.text.dropout or not captions.wants_null_features(system):
            return {}
        if system.text_encoder is None or self.assembly.tokenizer is None:
            return {}  # the step says so
        if "text_encoder" not in frozen:
            frozen = replace(self.assembly, system=replace(system, denoiser=None, vae=None)).frozen(self.layout)
        tokens, mask = self.assembly.tokenizer([""], length)
        null = {"text_emb": jax.jit(system.encode_text)(frozen["text_encoder"], tokens, mask), "text_mask": mask}
        if "text_encoder_2" in system.parts:
            tokens, _ = self.assembly.tokenizer_2([""], CLIP_TOKENS)
            null["y_vec"] = jax.jit(system.encode_pooled)(frozen["text_encoder_2"], tokens)
        return {"null": null}

    def place(self, batch: dict) -> dict:
        """A host batch as global device arrays: captions become tokens, what the networks do not take stays behind."""
        arrays = {name: value for name, value in batch.items() if name in CONSUMED}
        length = self.cfg.text.max_length
        if self.system.denoiser is not None and captions.classes(self.system):
            arrays["labels"] = captions.class_numbers(self.system, batch["text"])
        if self._reads_text and "text_emb" not in batch and self.system.text_encoder is not None:
            tokens, mask = self.assembly.tokenizer(list(batch["text"]), length)
            arrays |= {"text_tokens": tokens, "text_mask": mask}
        if "y_vec" not in batch and "text_encoder_2" in self.system.parts:
            arrays["text_tokens_2"], _ = self.assembly.tokenizer_2(list(batch["text"]), CLIP_TOKENS)
        arrays = {name: np.asarray(a, np.float32) if name in _FLOATS else np.asarray(a) for name, a in arrays.items()}
        return place_batch(arrays, self.layout)

    def work(self, batch: dict, info) -> dict:
        """Latent tokens and model FLOPs (three times forward) of the global batch."""
        rows = next(iter(batch.values()))
        count = len(rows) * rows_of_process(self.layout)[1]
        if "latents" in batch:
            size = batch["latents"].shape[1:4]
        else:
            size = self.system.latent_size(*batch["video"].shape[1:4])
        if self.assembly.trained == "vae":
            return {"tokens": count * math.prod(size), "flops": 0.0}
        patch = getattr(self.system.denoiser.config, "patch_size", 1)
        patch = (patch, patch) if isinstance(patch, int) else patch  # of space, where time is left whole
        patch = (1,) * (3 - len(patch)) + tuple(patch)
        tokens = count * math.prod(math.ceil(s / p) for s, p in zip(size, patch))
        if jax.default_backend() == "cpu":  # whose peak nobody asks for
            return {"tokens": tokens, "flops": 0.0}
        return {"tokens": tokens, "flops": 3 * self.forward_flops(LatentShape(count, *size, self.cfg.text.max_length))}

    def forward_flops(self, shape: LatentShape) -> float:
        """Every matmul of one forward pass, recomputation and padding not counted."""
        return shape.batch * forward_flops(self.system.denoiser, replace(shape, batch=1))

    # ---- step -----------------------------------------------------------------------------------------------------

    @property
    def trainable(self):
        """A boolean for every parameter: what the network's kind of it and config.optimizer.freeze say."""
        return optimizer.trainable(self.network.trainable, self.cfg.optimizer.freeze)

    def loss_fn(self):
        if self.assembly.trained == "vae":
            loss = self.system.reconstruction_loss(self.cfg.vae_loss, self._perceptual())
        else:
            objective, objective_config = objective_of(self.cfg.objective)
            text = self.cfg.text
            loss = self.system.diffusion_loss(objective, objective_config, text.dropout, self.given, text.guidance)
        still = lambda params: jax.tree.map(
            lambda leaf, yes: leaf if yes else jax.lax.stop_gradient(leaf), params, self.trainable
        )
        return lambda params, *args: loss(still(params), *args)  # what stands still costs no backward pass

    @cached_property
    def given(self) -> GivenFrames | TrainingConditions | None:
        """How the network is given frames, when it takes them beside the noise; masks come with the batch."""
        cfg, data, takes = self.cfg.conditions, self.cfg.data, self.system.takes
        family = self.system.denoiser.family
        if (data.mask_ratios or data.mask_types) and "x_mask" not in takes:
            way = "give config.conditions.kinds" if "cond" in takes else "it is never given frames"
            raise UserError(f"data.mask_ratios and data.mask_types mean nothing to {family}: {way}")
        if data.mask_types and "cond_mask" in takes:
            return GivenFrames(tuple(cfg.drop.items()), cfg.weight)
        if not cfg.kinds:
            return None
        if "cond" not in takes or "cond_mask" in takes:
            raise UserError(
                f"config.conditions.kinds means nothing to {family}: give data.mask_ratios or data.mask_types"
            )
        if self.system.vae is None:
            raise UserError("config.conditions.kinds needs a VAE: given frames are encoded by themselves")
        time = self.system.frames_of(3) - self.system.frames_of(2)
        causal = self.system.frames_of(2) < 2 * time
        return TrainingConditions(tuple(cfg.kinds.items()), causal, time, not causal, cfg.skip_stills)

    def _lpips(self):
        """The perceptual network and its folder, when the config names one."""
        folder = self.cfg.vae_loss.perceptual_weights
        if not folder or self.assembly.trained != "vae":
            return None
        config = read_json(Path(folder) / "config.json")
        return part("models", config, f"{folder}/config.json:").network(), Path(folder)

    def _perceptual(self):
        """LPIPS of every frame, for VAE training; None without converted weights."""
        found = self._lpips()
        if found is None:
            return None
        frames = lambda video: video.reshape(-1, *video.shape[2:])
        return lambda params, ours, given: found[0](params, frames(ours), frames(given))

    def perceptual_params(self) -> dict:
        found = self._lpips()
        return {"perceptual": load_params(found[1], found[0], self.layout)} if found else {}

    def compile_step(self, tx, abstract: dict):
        """The jitted update; it compiles once a bucket."""
        cfg = self.cfg
        step_config = StepConfig(cfg.seed, cfg.ema_decay, cfg.ema_start_steps, cfg.optimizer.accumulate_steps)
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        moves = {}
        if self.layout.state_rules is not None:
            moves["cut"] = lambda grads: jax.lax.with_sharding_constraint(grads, where["ema"])
        if cfg.optimizer.offload:
            near = jax.tree.map(lambda to: to.with_memory_kind("device"), where["opt"])
            moves["fetch"] = lambda moments: jax.device_put(moments, near)
        rate = optimizer.learning_rate(cfg.optimizer, cfg.steps)
        step = make_step(self.loss_fn(), tx, step_config, rate, **moves)
        return jax.jit(step, donate_argnums=0, out_shardings=(where, self.layout.replicated()))

    # ---- what comes out -------------------------------------------------------------------------------------------

    def pipeline(self, ema: dict, frozen: dict) -> Pipeline:
        params = {name: frozen[name] for name in self.system.parts if name != self.assembly.trained}
        params |= {self.assembly.trained: jax.tree.map(lambda e, p: e.astype(p.dtype), ema, self.network.abstract)}
        assembly = self.assembly
        return Pipeline(self.system, params, assembly.sampling, assembly.tokenizer, self.layout, assembly.tokenizer_2)

    def export(self, ema: dict, frozen: dict, loader, folder: str, dtype: str) -> None:
        pipeline = self.pipeline(ema, frozen)
        batches = self.cfg.vae_loss.calibrate_batches
        if self.assembly.trained == "vae" and batches and "shift" in ema:
            pipeline = self._calibrated(pipeline, loader, batches)
        pipeline.save_pretrained(folder, dtype=dtype)

    def _calibrated(self, pipeline: Pipeline, loader, batches: int) -> Pipeline:
        """Latents of mean 0 and deviation 1 a channel: what the denoiser's noise levels take for granted."""
        params = pipeline.params["vae"]

        @jax.jit
        def moments(params, video):
            z = self.system.encode_video(params, video).reshape(-1, params["shift"].size)
            return z.mean(0), jnp.square(z).mean(0)

        found = [jax.device_get(moments(params, self.place(next(loader)[0])["video"])) for _ in range(batches)]
        mean, square = (np.mean(part, axis=0, dtype=np.float64) for part in zip(*found))
        variance = square - mean**2
        shift = params["shift"] + params["scale"] * mean
        scale = params["scale"] * jnp.sqrt(variance)
        config = replace(self.system.vae.config, shift=tuple(shift.tolist()), scale=tuple(scale.tolist()))
        system = replace(self.system, vae=replace(self.system.vae, config=config))
        return Pipeline(
            system, {"vae": params | {"shift": shift, "scale": scale}}, pipeline.sampling, None, self.layout
        )

    def sample(self, ema: dict, frozen: dict, folder, step: int, writer) -> None:
        """Videos of the configured prompts and a contact sheet, from the EMA."""
        from opensora_jax.common.contact_sheet import contact_sheet, save_png
        from opensora_jax.data.video_io import write_video

        pipeline = self.pipeline(ema, frozen)
        if self.assembly.trained == "vae" or not self.cfg.log.sample_prompts:
            return
        out = pipeline(list(self.cfg.log.sample_prompts), seed=self.cfg.seed)
        if jax.process_index():
            return
        folder = folder / f"{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, frames in enumerate(out.frames):
            write_video(folder / f"{i:02d}.mp4", frames, fps=out.fps)
        sheet = contact_sheet(out.frames, list(self.cfg.log.sample_prompts))
        save_png(folder / "sheet.png", sheet)
        writer.write_images(step, {"samples": sheet})


_FLOATS = ("fps", "height", "width", "num_frames", "text_emb", "y_vec", "latents", "video")


def abstract_batch(trainer: Trainer, rows: int, frames: int, height: int, width: int, latents: bool) -> dict:
    """Shapes of a global batch, for compiling without data."""
    size = trainer.system.latent_size(frames, height, width) if trainer.system.vae is not None else None
    arrays = dict.fromkeys(("fps", "height", "width", "num_frames"), ((rows,), jnp.float32))
    length = trainer.cfg.text.max_length
    given = {}
    if trainer.assembly.trained == "denoiser":
        denoiser = trainer.system.denoiser
        given = denoiser.module.inputs(denoiser.config, LatentShape(rows, *(size or (frames, height, width)), length))
        arrays["x_mask"] = ((rows, size[0] if size else frames), jnp.bool_)
        arrays["text_mask"] = ((rows, length), jnp.int32)
    if latents and size is not None:
        arrays["latents"] = (given["x"].shape, jnp.float32)
    else:
        arrays["video"] = ((rows, frames, height, width, 3), jnp.float32)
    for name, of_batch in (("y", "text_emb"), ("y_vec", "y_vec")):
        if name in given and (latents or trainer.system.text_encoder is None):
            arrays[of_batch] = (given[name].shape, given[name].dtype)
        elif name == "y" and name in given:
            arrays["text_tokens"] = ((rows, length), jnp.int32)
        elif name == "y_vec" and name in given:
            arrays["text_tokens_2"] = ((rows, CLIP_TOKENS), jnp.int32)
    where = lambda shape: trainer.layout.sharding(("batch", *[None] * (len(shape) - 1)), shape)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where(shape)) for name, (shape, dtype) in arrays.items()}
