"""Our GPU kernels compiled for Hopper on a machine without a GPU: do they compile, and do they spill? No times.

    python -m benchmarks.gpu_compile                                      # every case, forward and backward
    python -m benchmarks.gpu_compile --cases "v2.0 joint 256px" --tune    # its alternative block sizes too

Needs jax's CUDA plugin (`pip install jax-cuda13-plugin jax-cuda13-pjrt`, of jax's own version) and `ptxas` (of the CUDA
toolkit) in the PATH. Spills are ptxas' own count for sm_90a, over all kernels of a call.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ARCH = "sm_90a"
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
KERNELS = ("pallas_gpu", "mosaic_gpu")


def prepare(folder: str) -> None:
    """Before jax is imported: this process uses no device, and every PTX that is compiled lands in the folder."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_TO": folder,
    }


def sharding():
    """On the one device of a machine that is only described."""
    import jax
    from jax.experimental import topologies

    described = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=H200)
    mesh = topologies.make_mesh(described, (1,), ("one",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compiled(run, arrays, where, folder: Path) -> dict:
    """Compiles a call and its gradients; kernels, registers, bytes spilled and seconds."""
    import jax

    from opensora_jax.kernels import spec

    def both(*arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(out)

    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    begin = time.time()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in arrays]
    try:
        with spec.target("hopper"):
            jax.jit(both, out_shardings=where).trace(*shapes).lower().compile()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
    report = ""
    for ptx in folder.rglob("*.ptx"):
        command = ["ptxas", "-v", f"-arch={ARCH}", "-o", "/dev/null", str(ptx)]
        report += subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = lambda pattern: list(map(int, re.findall(pattern, report)))
    return {
        "registers": max(numbers(r"Used (\d+) registers"), default=0),
        "spilled": sum(numbers(r"(\d+) bytes spill stores")),
        "serialised": "serialized" in report,
        "seconds": time.time() - begin,
    }


def extras_of(case) -> dict:
    """Lengths, tables and weights of the case, without drawing its large arrays."""
    return replace(case, **{"keys" if case.kind == "temporal" else "queries": 1}).inputs()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--tune", action="store_true", help="alternative block sizes too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        return report(arguments, Path(folder))


def report(arguments, folder: Path) -> int:
    import jax

    from benchmarks.attention_runs import alternatives, real_cases
    from opensora_jax.kernels import attention, stdit

    where, failures = sharding(), 0
    print(f"{ARCH}, jax {jax.__version__}")
    print("| case | kernel | registers | bytes spilled | wgmma serialised | s |")
    print("|---|---|---|---|---|---|")
    for case in real_cases():
        if arguments.cases not in case.name:
            continue
        public = stdit.stdit_attention if case.fused else attention.attention
        arrays, extras = jax.eval_shape(lambda case=case: case.inputs()[0]), extras_of(case)
        runs = {name: functools.partial(public, implementation=name, **extras) for name in arguments.kernels}
        runs |= alternatives(case, extras)[0] if arguments.tune else {}
        for name, run in runs.items():
            found = compiled(run, arrays, where, folder)
            failures += "refused" in found and not found["refused"].startswith("Unsupported")
            cells = [found["refused"]] if "refused" in found else [
                str(found["registers"]), str(found["spilled"]), "yes" if found["serialised"] else "no",
                f"{found['seconds']:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join([case.name, name, *cells]) + " |", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
