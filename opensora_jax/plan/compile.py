"""Compiling a run's step from shapes alone: what `--config.dry_run` and `plan` share."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opensora_jax.common.errors import UserError
from opensora_jax.common.shapes import LatentShape
from opensora_jax.generator import Generator
from opensora_jax.kernels import spec
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.pipeline import assemble
from opensora_jax.sampling.guidance import Guidance
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


def mesh_of(config: MeshConfig, devices: Sequence) -> Mesh:
    """The config's mesh over described devices."""
    if config.slice > 1:
        raise UserError("plan: one topology is one pod; plan it with config.mesh.slice=1")
    return make_mesh(config, devices)


@dataclass(frozen=True)
class Program:
    """A step, traced for one bucket on one layout."""

    trainer: Trainer
    layout: shard.Layout
    workload: Workload
    held: Any  # what stays on the devices between steps: the train state, or the parameters
    traced: Any
    shape: LatentShape  # of the global batch
    target: str | None = None
    forwards: int = 3  # a training step costs three forward passes
    frozen: Any = None  # parameters of the encoders that the step runs

    @property
    def state_bytes(self) -> int:
        """On one device, exactly: every leaf's own shard, but for what the host keeps."""
        held = jax.tree.leaves((self.held, self.frozen))
        leaves = [leaf for leaf in held if leaf.sharding.memory_kind != shard.HOST]
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    @property
    def model_flops(self) -> float:
        """Of one step over the global batch, recomputation not counted. Training of a VAE is not counted."""
        if self.trainer.assembly.trained != "denoiser":
            return 0.0
        return self.forwards * self.trainer.forward_flops(self.shape)

    def lower(self):
        with scope(self.layout, self.target):
            return self.traced.lower(lowering_platforms=("tpu",)) if self.target else self.traced.lower()


@contextlib.contextmanager
def scope(layout: shard.Layout, target: str | None):
    with spec.target(target) if target else contextlib.nullcontext(), shard.use(layout):
        yield


def trace(
    cfg: RunConfig, layout: shard.Layout, workload: Workload, target: str | None = None, clips: bool = False
) -> Program:
    """The training step on latents and text features, as in a run on encoded shards, or on clips and captions, which it
    encodes first. `target`: choose kernels for this chip. Only the trace sees the mesh: described devices cannot run
    anything eagerly."""
    assembly = assemble(cfg, weightless=True)
    trainer = Trainer(cfg, assembly, layout)
    network = trainer.trained_network()
    if assembly.system.vae is None:
        raise UserError(
            "config.vae is empty; name its family (it need not have weights): it says how large latents are"
        )
    mask = optimizer.trainable(network.trainable, cfg.optimizer.freeze)
    tx = optimizer.make(cfg.optimizer, cfg.steps, mask)
    state = abstract_state(network, tx, layout, offload=cfg.optimizer.offload)
    rows = workload.clips * trainer.data_shards * cfg.data.batch_scale
    latents = assembly.trained == "denoiser" and not clips
    batch = abstract_batch(trainer, rows, workload.frames, workload.height, workload.width, latents)
    frozen = frozen_params(trainer) if clips else {}
    with scope(layout, target):
        traced = trainer.compile_step(tx, state).trace(state, batch, frozen)
    size = trainer.system.latent_size(workload.frames, workload.height, workload.width)
    shape = LatentShape(rows, *size, cfg.text.max_length)
    return Program(trainer, layout, workload, state, traced, shape, target, frozen=frozen)


def placed(leaf, names, layout: shard.Layout) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(names, leaf.shape))


def network_params(network, layout: shard.Layout):
    """Shapes of a network's parameters, cut over the mesh."""
    return jax.tree.map(lambda leaf, names: placed(leaf, names, layout), network.abstract, network.axes)


def frozen_params(trainer: Trainer) -> dict:
    """Of every part that is not trained, as a run on clips holds them."""
    assembly = trainer.assembly
    absent = [name for name in trainer.encoders if name not in assembly.system.parts]
    if absent:
        raise UserError(f"plan: --data=clips needs config.{' and config.'.join(absent)}, which encode them")
    parts = assembly.system.networks.items()
    return {name: network_params(network, trainer.layout) for name, network in parts if name != assembly.trained}


def trace_sample(cfg: RunConfig, layout: shard.Layout, workload: Workload, target: str | None = None) -> Program:
    """One step of sampling: both branches of guidance through the denoiser, and the solver's update."""
    assembly = assemble(cfg, weightless=True)
    trainer = Trainer(cfg, assembly, layout)
    network, system = trainer.trained_network(), assembly.system
    rows = workload.clips * trainer.data_shards * cfg.data.batch_scale
    shape = LatentShape(
        rows, *system.latent_size(workload.frames, workload.height, workload.width), cfg.text.max_length
    )
    given = dict(system.denoiser.module.inputs(system.denoiser.config, shape))
    x = given.pop("x")
    given.pop("t")
    if system.learned_null:
        given["drop_text"] = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    by_batch = lambda leaf: placed(leaf, ("batch", *[None] * (leaf.ndim - 1)), layout)
    branches = (jax.tree.map(by_batch, given),) * (1 if "guidance" in given else 2)
    sampling = assembly.sampling
    generator = Generator(system, None)
    solver = generator._solver(sampling)
    full = lambda value: np.full((rows,), value, np.float32)
    sizes = {"height": full(workload.height), "width": full(workload.width), "num_frames": full(workload.frames)}
    times = solver.schedule(x.shape, sizes | {"fps": full(sampling.fps)})
    state = jax.tree.map(by_batch, jax.eval_shape(solver.init, x))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    number = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    guidance = Guidance(channels=sampling.guided_channels or None, rescale=sampling.guidance_rescale)
    params = network_params(network, layout)
    with scope(layout, target):
        traced = generator._step.trace(
            params, state, branches, keys, times, number(jnp.int32),
            (number(jnp.float32), number(jnp.float32, x.shape[1])), solver=solver, guidance=guidance, frames=(),
        )  # fmt: skip
    return Program(trainer, layout, workload, params, traced, shape, target, forwards=len(branches))


def lower(cfg: RunConfig, layout: shard.Layout, workload: Workload):
    """What the dry run compiles on this machine: (program, lowered)."""
    program = trace(cfg, layout, workload)
    return program, program.lower()
