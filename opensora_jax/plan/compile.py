"""Compiling a run's training step from shapes alone: what `--config.dry_run` and `plan` share."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from opensora_jax.common.shapes import LatentShape
from opensora_jax.parallel import shard
from opensora_jax.pipeline import assemble
from opensora_jax.trainer import Trainer, abstract_batch
from opensora_jax.training import optimizer
from opensora_jax.training.run import RunConfig
from opensora_jax.training.state import abstract_state


@dataclass(frozen=True)
class Workload:
    """One bucket: clips a device group, frames and pixels."""

    name: str
    clips: int
    frames: int
    height: int
    width: int


def workloads(cfg: RunConfig) -> list[Workload]:
    """Every bucket of the config that is ever used, largest first by latent volume a step."""
    from opensora_jax.common.aspect import aspect_table

    data = cfg.data
    if not data.buckets:
        single = Workload(f"{data.height}x{data.width}", data.batch_size, data.num_frames, data.height, data.width)
        return [single]
    found = []
    for resolution, rows in data.buckets.items():
        for frames, (keep, clips) in rows.items():
            share = keep if isinstance(keep, (int, float)) else keep[0]
            if share and clips:
                _, table = aspect_table(resolution, data.bucket_version, multiple=data.size_multiple)
                height, width = max(table.values(), key=lambda size: size[0] * size[1])
                found.append(Workload(f"{resolution} x {frames}", int(clips), int(frames), height, width))
    return sorted(found, key=lambda w: w.clips * w.frames * w.height * w.width, reverse=True)


def largest(cfg: RunConfig) -> Workload:
    """The bucket with the longest single clip: what decides whether the model fits at all; ties by batch."""
    return max(workloads(cfg), key=lambda w: (w.frames * w.height * w.width, w.clips))


@dataclass(frozen=True)
class Program:
    """A training step, lowered for one bucket on one layout."""

    trainer: Trainer
    workload: Workload
    state: dict
    lowered: Any
    shape: LatentShape  # of the global batch

    @property
    def state_bytes(self) -> int:
        """On one device, exactly: every leaf's own shard."""
        leaves = jax.tree.leaves(self.state)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    @property
    def model_flops(self) -> float:
        """Of one step over the global batch: three times forward, recomputation not counted."""
        return 3 * self.trainer.forward_flops(self.shape)


def lower(cfg: RunConfig, layout: shard.Layout, workload: Workload) -> Program:
    """Latents and text features come from the data set, as in a run on encoded shards."""
    with shard.use(layout):
        assembly = assemble(cfg, weightless=True)
        trainer = Trainer(cfg, assembly, layout)
        network = trainer.trained_network()
        mask = optimizer.trainable(network.trainable, cfg.optimizer.freeze)
        tx = optimizer.make(cfg.optimizer, cfg.steps, mask)
        state = abstract_state(network, tx, layout)
        rows = workload.clips * trainer.data_shards * cfg.data.batch_scale
        latents = assembly.trained == "denoiser"
        batch = abstract_batch(trainer, rows, workload.frames, workload.height, workload.width, latents)
        lowered = trainer.compile_step(tx, state).lower(state, batch, {})
    size = trainer.system.latent_size(workload.frames, workload.height, workload.width)
    return Program(trainer, workload, state, lowered, LatentShape(rows, *size, cfg.text.max_length))
