"""How much memory converting a large checkpoint takes.

    python -m benchmarks.convert_memory --manifest=tests/goldens/manifests/opensora2_mmdit_11b.json --folder=DIR [--json]

Writes random bf16 weights with a manifest's names and shapes (about 24 GB for Open-Sora 2.0), sharded as released files are,
converts them in a process of its own and samples that process's anonymous memory (RssAnon of /proc/PID/status: what cannot
be dropped, unlike pages of the file being read). DIR needs twice the size of the checkpoint.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from opensora_jax.weights import store


def generate(manifest: Path, folder: Path) -> int:
    """Random finite bf16 weights; returns their bytes."""
    tensors = json.loads(manifest.read_text())
    shapes = tensors["parameters"] | tensors.get("buffers", {})
    specs = {name: (tuple(shape), "bfloat16") for name, shape in shapes.items()}
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(store.numpy_dtype("bfloat16"))

    def arrays():
        for name, (shape, _) in specs.items():
            size = int(np.prod(shape, dtype=np.int64))
            yield name, np.resize(block, size).reshape(shape)

    store.write_folder(folder, specs, arrays(), tensors.get("config"))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


def measure(source: Path, target: Path) -> tuple[int, float]:
    """Peak anonymous bytes and seconds of one conversion."""
    began, peak = time.monotonic(), 0
    words = [sys.executable, "-m", "opensora_jax.convert", f"--from={source}", f"--to={target}"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"convert ended with {process.returncode}")
    return peak, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source, target = args.folder / "source", args.folder / "converted"
    try:
        size = generate(args.manifest, source)
        peak, seconds = measure(source, target)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    row = {
        "manifest": args.manifest.stem,
        "checkpoint_gb": size / 1e9,
        "peak_anon_gib": peak / 2**30,
        "seconds": seconds,
    }
    text = f"{row['manifest']}: {size / 1e9:.1f} GB converted in {seconds:.0f} s, at most {peak / 2**30:.2f} GiB anonymous memory"
    print(json.dumps(row) if args.json else text)


if __name__ == "__main__":
    main()
