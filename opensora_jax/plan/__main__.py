"""python -m opensora_jax.plan --config=FILE --topology=v5p:4x4x4 [--mesh=data=2,fsdp=4,context=8] [--config.key=value ...]

What a step needs before a machine is rented: the TPU compiler runs on this CPU (pip install 'opensora-jax[aot]') and says
what fits; time is estimated from its cycles and from link rates. The largest bucket of the config is planned.
"""

import sys

from opensora_jax import config
from opensora_jax.common.errors import UserError, guarded
from opensora_jax.plan import chips

AXES = ("data", "fsdp", "context", "tensor")


def arguments(argv=None):
    parser = config.Parser("plan", __doc__)
    parser.add_argument("--config", metavar="FILE[:variant]", help="a configuration file, e.g. configs/stage3.py")
    parser.add_argument("--topology", metavar="CHIP:AxB[xC]", help=f"{chips.EXAMPLES} (8 GPUs x 16 machines)")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="instead of the config's: data=2,fsdp=4,context=8,rules=full"
    )
    parser.add_argument("--task", choices=("train", "sample"), default="train", help="which step (train)")
    parser.add_argument("--hlo", metavar="FILE", default="", help="also write the optimized HLO here")
    parser.add_argument("--schedules", action="store_true", help="time our kernels by their static schedules (slower)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse(argv)


def set_mesh(tree: dict, text: str) -> None:
    """--mesh in place of the config's axes; what is not named is 1, and data takes what is left."""
    mesh = {"data": -1, "rules": tree.get("mesh", {}).get("rules", "fsdp")}
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

    from opensora_jax.plan import libtpu

    folder = libtpu.temporary("libtpu-schedules-") if args.schedules else ""
    libtpu.prepare(libtpu.dump_to(folder) if folder else "")
    from opensora_jax.plan import report, target
    from opensora_jax.training.run import RunConfig

    cfg = config.build(RunConfig, tree, "config")
    plans = [target.compiled(cfg, topology, args.task, args.hlo, folder)]
    print(report.as_json(plans) if args.json else report.text(plans[0]))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
