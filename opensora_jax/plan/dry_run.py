"""`train --config.dry_run=True`: compile the step for the config's mesh on this CPU and say what it holds.

Parameters and state are exact. Working memory is the CPU compiler's, which fuses less than an accelerator's: an upper
bound; `python -m opensora_jax.plan` asks the TPU compiler itself.
"""

import os
import time

from opensora_jax import config
from opensora_jax.common.errors import UserError


def dry_run(tree: dict) -> int:
    mesh = tree.get("mesh", {})
    sizes = [mesh.get(axis, 1) for axis in ("slice", "data", "fsdp", "context", "tensor")]
    devices = 1
    for size in sizes:
        devices *= max(1, size)
    if devices > 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from opensora_jax.parallel import runtime, shard
    from opensora_jax.parallel.mesh import make_mesh
    from opensora_jax.plan.compile import largest, lower
    from opensora_jax.training.run import RunConfig

    began = time.monotonic()
    cfg = config.build(RunConfig, tree, "config")
    runtime.set_precision(cfg.precision)
    if jax.device_count() < devices:
        raise UserError(
            f"the dry run needs {devices} CPU devices for this mesh, but JAX was already started with fewer"
        )
    layout = shard.layout(make_mesh(cfg.mesh, jax.devices()[:devices]), cfg.mesh.rules, cfg.mesh.attention)
    workload = largest(cfg)
    program, lowered = lower(cfg, layout, workload)
    network = program.trainer.trained_network()
    with shard.use(layout):
        memory = lowered.compile().memory_analysis()
    print("\n".join(describe(cfg, program, network, memory, devices, layout)))
    print(f"compiled in {time.monotonic() - began:.0f} s; nothing was read or written")
    return 0


def describe(cfg, program, network, memory, devices: int, layout) -> list[str]:
    from flax import nnx

    from opensora_jax.nn.params import Buffer

    trained = network.count(nnx.Param)
    axes = " x ".join(f"{axis} {size}" for axis, size in layout.sizes.items())
    w, shape = program.workload, program.shape
    flops = program.model_flops
    rows = [
        ("parameters", f"{network.count():,} trainable and fixed, {trained:,} of them trainable"),
        ("buffers", f"{network.count(Buffer):,} scalars beside them"),
        ("mesh", f"{axes} = {devices} devices, rules {cfg.mesh.rules}"),
        ("largest bucket", f"{w.name} frames at {w.height}x{w.width}, {w.clips} a group, {shape.batch} in all"),
        ("latents", f"{shape.frames} x {shape.height} x {shape.width}"),
        ("state / device", f"{gib(program.state_bytes)}: parameters, EMA, optimizer"),
        ("arguments / device", f"{gib(memory.argument_size_in_bytes)}: state and batch"),
        ("temporaries / device", f"{gib(memory.temp_size_in_bytes)} by the CPU compiler, an upper bound"),
        ("model FLOPs / step", f"{flops / 1e12:,.2f} TFLOP in all, {flops / devices / 1e12:,.2f} a device"),
    ]
    return [f"{name:22s}{value}" for name, value in rows]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
