"""Loss and gradients of the demo's denoiser on a CPU: with this process's allocator, on one device and on one a core.

python -m benchmarks.cpu_step
LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always python -m benchmarks.cpu_step
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from functools import partial


def measure(clips: int, steps: int) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from configs.demo.stdit3 import get_config
    from opensora_jax.common.shapes import LatentShape
    from opensora_jax.config import part

    denoiser = part("models", get_config().model.to_dict(), "config.model")
    network = denoiser.network()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    params = jax.jit(network.init, out_shardings=whole)(jax.random.key(0))
    given = {
        name: jax.device_put(jnp.ones(a.shape, a.dtype), rows)
        for name, a in denoiser.module.inputs(denoiser.config, LatentShape(clips, 5, 8, 8, 16)).items()
    }
    x, t = given.pop("x"), given.pop("t")
    loss = lambda params, x, t, given: jnp.mean(jnp.square(network(params, x, t, **given)))
    step = partial(jax.jit(jax.value_and_grad(loss)), params, x, t, given)
    jax.block_until_ready(step())
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    for _ in range(steps):
        jax.block_until_ready(step())
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    user, system, faults = (getattr(after, n) - getattr(before, n) for n in ("ru_utime", "ru_stime", "ru_minflt"))
    print(
        f"{jax.device_count()} devices: {1e3 * seconds / steps:,.0f} ms a step, CPU {1e3 * (user + system) / steps:,.0f} ms, "
        f"of it system {1e3 * system / steps:,.0f} ms, {faults / steps:,.0f} page faults",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=32, help="in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--devices", type=int, help="of this process; both kinds when not given")
    args = parser.parse_args()
    if args.devices:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
        measure(args.clips, args.steps)
        return
    for devices in (1, os.cpu_count() or 1):
        command = [sys.executable, "-m", "benchmarks.cpu_step", f"--devices={devices}"]
        subprocess.run([*command, f"--clips={args.clips}", f"--steps={args.steps}"], check=True)


if __name__ == "__main__":
    main()
