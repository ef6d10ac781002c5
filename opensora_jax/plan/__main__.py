"""python -m opensora_jax.plan --config=FILE --topology=v5p:4x4x4 [--mesh=data=2,fsdp=4,context=8] [--config.key=value ...]

What a step needs before a machine is rented: the TPU compiler runs on this CPU (pip install 'opensora-jax[aot]') and says
what fits; time is estimated from its cycles and from link rates. The largest bucket of the config is planned. GPUs
(--topology=h100:8x16) are planned by formula: no compiler for them is needed, and none is asked.
"""

import os
import sys

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded
from opensora_jax.plan import chips, libtpu

ROWS = 20  # of a ranking that are shown
AXES = ("data", "fsdp", "context", "tensor")


def arguments(argv=None):
    parser = config.Parser("plan", __doc__)
    parser.add_argument("--config", metavar="FILE[:variant]", help="a configuration file, e.g. configs/stage3.py")
    parser.add_argument("--topology", metavar="CHIP:AxB[xC]", help=f"{chips.EXAMPLES} (8 GPUs x 16 machines)")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="instead of the config's: data=2,fsdp=4,context=8,rules=full"
    )
    parser.add_argument("--task", choices=("train", "sample"), default="train", help="which step (train)")
    parser.add_argument(
        "--data", choices=("latents", "clips"), default="latents", help="clips: the step runs VAE and text encoder too"
    )
    parser.add_argument("--search", action="store_true", help="rank meshes, remat policies and micro-batches")
    parser.add_argument(
        "--compile", type=int, default=2, metavar="N", help="with --search: the N best (2); 0: nothing, all by formula"
    )
    parser.add_argument("--hlo", metavar="FILE", default="", help="also write the optimized HLO here")
    parser.add_argument(
        "--schedules", action="store_true", help="time our kernels by their static schedules (twice as slow)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse(argv)


def set_mesh(tree: dict, text: str) -> None:
    """--mesh in place of the config's axes; what is not named is 1, and data takes what is left."""
    mesh = {"data": -1} | {key: value for key, value in tree.get("mesh", {}).items() if key in ("rules", "attention")}
    for word in text.split(","):
        axis, equals, size = (part.strip() for part in word.partition("="))
        if axis == "rules" and size:
            mesh["rules"] = size
        elif axis in AXES and size.lstrip("-").isdigit():
            mesh[axis] = int(size)
        else:
            raise UserError(f"--mesh={text}: {word!r} is not AXIS=N; axes are {', '.join(AXES)}, and rules=PRESET")
    tree["mesh"] = mesh


def main(argv=None) -> int:
    args, overrides = arguments(argv)
    tree = config.load(args.config, overrides)
    if not args.topology:
        raise UserError(f"--topology is missing; for example {chips.EXAMPLES}")
    topology = chips.parse(args.topology)
    if args.mesh:
        set_mesh(tree, args.mesh)

    if args.schedules and args.search:
        raise UserError("--schedules times one program; those of a search could not be told apart")
    folder = libtpu.temporary("libtpu-schedules-") if args.schedules and topology.chip.is_tpu else ""
    prepare(topology, libtpu.dump_to(folder) if folder else "")
    from opensora_jax.plan import report, target
    from opensora_jax.plan.formula import Traced
    from opensora_jax.plan.search import search
    from opensora_jax.training.run import RunConfig

    cfg = config.build(RunConfig, tree, "config")
    task = args.task
    if args.data == "clips":
        if task != "train":
            raise UserError("--data=clips is for --task=train; sampling starts from noise")
        task = "train on clips"
    if args.search:
        plans = search(cfg, topology, task, target.describe(topology), max(0, args.compile))
    elif topology.chip.is_tpu and args.compile > 0:
        plans = [target.compiled(cfg, topology, task, args.hlo, folder)]
    else:
        plans = [Traced.of(target.traced(cfg, topology, task)).plan(cfg, topology)]
    if args.json:
        print(report.as_json(plans))
    else:
        print("\n".join([report.table(plans[:ROWS]), "", "The first of them:"] * args.search + [report.text(plans[0])]))
    return 0


def prepare(topology: chips.Topology, compiler_flags: str) -> None:
    """The environment that jax reads when it is imported."""
    if topology.chip.is_tpu:
        libtpu.prepare(compiler_flags)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    count = f"--xla_force_host_platform_device_count={topology.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()


if __name__ == "__main__":
    sys.exit(guarded(main))
