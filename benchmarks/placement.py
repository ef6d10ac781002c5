"""How long the exchanges over `context` take where a mesh lies on the torus, against JAX's own placement; an ESTIMATE.

    pip install 'opensora-jax[aot]'        # libtpu describes the chips; nothing is compiled
    python -m benchmarks.placement

The exchanges are those of STDiT 1.0's training step on 64 latent frames of 512x512 over 8 chips: 140 all-to-alls of 18.9 MB.
"""

import sys

from opensora_jax.plan import chips, libtpu

MESHES = (
    ("v6e:2x4", {"data": 1, "fsdp": 1, "context": 8}),
    ("v6e:8x8", {"data": 2, "fsdp": 4, "context": 8}),
    ("v6e:16x16", {"data": 8, "fsdp": 4, "context": 8}),
    ("v5p:4x4x4", {"data": 2, "fsdp": 4, "context": 8}),
    ("v5p:8x8x8", {"data": 8, "fsdp": 8, "context": 8}),
    ("v5p:8x8x16", {"data": 32, "fsdp": 4, "context": 8}),
    ("v6e:8x8", {"data": 8, "fsdp": 8, "context": 1}),
)


def main() -> int:
    libtpu.prepare()
    import numpy as np
    from jax.experimental import mesh_utils

    from opensora_jax.parallel import torus
    from opensora_jax.plan.hlo import Collective
    from opensora_jax.plan.links import Links

    def told(topology, sizes, placed) -> str:
        links = Links.of(topology, sizes, placed)
        box = " x ".join(str(side.length) for side in links.span(("context",)).sides) or "1"
        exchange = Collective("all-to-all", ("context",), sizes["context"], "bf16", 8 * 1024 * 1152 * 2.0, 140)
        wait = links.seconds(exchange) if sizes["context"] > 1 else 0.0
        rows = {}
        for number, group in enumerate(placed.reshape(-1, sizes["context"])):
            for device in group:
                rows.setdefault(device.process_index, set()).add(number)
        apart = any(max(held) - min(held) + 1 > len(held) for held in rows.values())
        return f"{box}, {wait * 1e3:.1f} ms" + (", REFUSED: rows of a process are not consecutive" * apart)

    print("| topology | mesh | JAX's placement | ours |\n|---|---|---|---|")
    for name, sizes in MESHES:
        topology = chips.parse(name)
        devices = libtpu.devices(topology)
        shape = tuple(sizes.values())
        theirs = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        ours = torus.placed(sizes, devices)
        mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        print(f"| {name} | {mesh} | {told(topology, sizes, np.asarray(theirs))} | {told(topology, sizes, ours)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
