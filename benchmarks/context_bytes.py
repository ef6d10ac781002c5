"""What a full-size STDiT step exchanges under sequence sharding, beside theory: from the compiled program, on any CPU.

    python -m benchmarks.context_bytes                                    # STDiT 1.0, 64 x 512 x 512, 2 x 4 x 8 devices
    python -m benchmarks.context_bytes --family stdit3 --latents 120 90 160 --text 300 --remat switches

Loss and gradients of all layers with parameters cut over fsdp and context; the optimizer, which is elementwise, is left
out. The CPU compiler partitions as the TPU's does; where it carries bfloat16 as float32, bytes are counted as bfloat16.
"""

import argparse
import importlib
import os
import time
from dataclasses import replace


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="stdit", choices=("stdit", "stdit2", "stdit3"))
    parser.add_argument("--latents", type=int, nargs=3, default=(64, 64, 64), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--text", type=int, default=120)
    parser.add_argument("--mesh", type=int, nargs=3, default=(2, 4, 8), metavar=("DATA", "FSDP", "CONTEXT"))
    parser.add_argument("--remat", default="full")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = arguments(argv)
    data, fsdp, context = args.mesh
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={data * fsdp * context}"

    from opensora_jax.parallel import shard
    from opensora_jax.parallel.mesh import MeshConfig, make_mesh
    from opensora_jax.plan import hlo

    layout = shard.layout(make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context)), "fsdp_context")
    began = time.process_time()
    network, cfg, text = compiled(args, layout)
    found = hlo.contents(hlo.parse(text), layout.sizes).collectives
    frames, height, width = args.latents
    share = frames * (height // 2) * (width // 2) * cfg.hidden_size * 2 / context * (context - 1) / context
    switches = {"full": 5, "switches": 4, "none": 4}[args.remat]
    print(f"{args.family}, {network.count():,} parameters, compiled in {time.process_time() - began:.0f} CPU s")
    print("| exchange | over | a step | MB sent by a device |\n|---|---|---|---|")
    for kind, axes in sorted({(c.kind, c.axes) for c in found}):
        of_kind = [c for c in found if (c.kind, c.axes) == (kind, axes)]
        sent = sum(as_bfloat16(c) for c in of_kind)
        print(f"| {kind} | {', '.join(axes)} | {sum(c.count for c in of_kind)} | {sent / 1e6:,.1f} |")
    over_context = [c for c in found if c.axes == ("context",)]
    print(f"switches by theory: {switches * cfg.depth}, {switches * cfg.depth * share / 1e6:,.1f} MB")
    print(f"sent over context:  {sum(as_bfloat16(c) for c in over_context) / 1e6:,.1f} MB")
    gradients = sum(as_bfloat16(c) for c in found if c.kind in ("reduce-scatter", "all-reduce"))
    ways = fsdp * context
    print(f"gradients: {gradients / (2 * network.count() * (ways - 1) / ways):.2f} x a reduce-scatter in bfloat16")


def compiled(args, layout):
    """The network, its config and the program's text."""
    import jax
    import jax.numpy as jnp

    from opensora_jax.common.shapes import LatentShape
    from opensora_jax.nn.params import Network
    from opensora_jax.parallel import shard

    module = importlib.import_module(f"opensora_jax.models.{args.family}")
    cfg = replace(next(iter(module.PRESETS.values())), dtype="bfloat16", remat=args.remat)
    network = Network.of(lambda rngs: module.build(cfg, rngs=rngs))
    shape = LatentShape(args.mesh[0] * args.mesh[1], *args.latents, args.text)

    def loss(params, inputs):
        return jnp.square(network(params, **inputs)).mean()

    with shard.use(layout):
        struct = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        where = shard.shardings(network.abstract, network.axes, layout)
        params = jax.tree.map(struct, network.abstract, where)
        inputs = {
            name: struct(leaf, layout.sharding(("batch",), leaf.shape))
            for name, leaf in module.inputs(cfg, shape).items()
        }
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(layout.replicated(), where))
        quick = {"xla_backend_optimization_level": 0}  # of machine code that never runs
        return network, cfg, step.lower(params, inputs).compile(quick).as_text()


def as_bfloat16(collective) -> float:
    return collective.moved / {"f32": 2, "bf16": 1}[collective.dtype]


if __name__ == "__main__":
    main()
