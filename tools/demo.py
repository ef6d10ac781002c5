"""make demo: teach the shipped pipeline a colour that it has never seen, and show it.

Writes shards of orange shapes (and some of the old colours, so that these are not forgotten), encodes them, samples the
shipped pipeline, fine-tunes it with `opensora_jax.train` (interrupted and resumed once), samples again, and says where
the pictures are. Every step is a command that is printed, so that each can be run by hand.

    python tools/demo.py [--minutes=4] [--out=runs/demo] [--scratch]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A device a core, and memory that is kept from step to step (docs/performance.md, "Training on a CPU").
QUICK = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    f"glibc.malloc.trim_threshold={1 << 34}:glibc.malloc.top_pad={1 << 28}",
}
sys.path.insert(0, str(ROOT))


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(*words: str, stop_after_step: int | None = None) -> None:
    """A module of ours as a command; with stop_after_step it gets SIGTERM once its metrics show that step."""
    print("$ python -m " + " ".join(words), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=QUICK | os.environ)
    if stop_after_step is not None:
        workdir = Path(next(word for word in words if word.startswith("--workdir=")).partition("=")[2])
        while process.poll() is None and last_step(workdir) < stop_after_step:
            time.sleep(0.2)
        print("(interrupting the run: it saves and leaves; the same command then goes on)", flush=True)
        process.send_signal(signal.SIGTERM)
    if process.wait():
        raise SystemExit(f"make demo stopped: the command above ended with {process.returncode}")


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


def prompts():
    """All 24 orange scenes, and 24 of the old colours (every colour four times, seen triples only)."""
    import numpy as np

    from opensora_jax.data import shapes

    orange = [scene.caption for scene in shapes.scenes("all", ("orange",))]
    known = shapes.scenes("train")
    rng = np.random.default_rng(0)
    picked = []
    for colour in shapes.COLOURS:
        mine = [scene.caption for scene in known if scene.colour == colour]
        picked += [mine[i] for i in rng.choice(len(mine), 4, replace=False)]
    return orange, picked


def sample_and_judge(source: str) -> dict:
    from opensora_jax.pipeline import Pipeline
    from tests.oracle import ATTRIBUTES, matches

    pipeline = Pipeline.from_pretrained(source)
    results = {}
    for name, texts in zip(("orange", "known"), prompts()):
        frames = pipeline.generate(texts, list(range(len(texts)))).frames
        judged = [matches(clip, text) for clip, text in zip(frames, texts)]
        share = {key: sum(j[key] for j in judged) / len(judged) for key in ATTRIBUTES}
        share["all"] = sum(all(j.values()) for j in judged) / len(judged)
        results[name] = {"texts": texts, "frames": frames, "share": share}
        print(f"{name} prompts right: " + ", ".join(f"{key} {value:.0%}" for key, value in share.items()), flush=True)
    return results


def show(before: dict, after: dict, out: Path, fps: float = 8.0) -> None:
    from opensora_jax.common.contact_sheet import contact_sheet, enlarged, save_png
    from opensora_jax.data.video_io import write_video

    rows, captions = [], []
    for i in range(0, len(before["orange"]["texts"]), 5):
        for label, result in (("before", before), ("after", after)):
            rows.append(result["orange"]["frames"][i])
            captions.append(f"{label}: {result['orange']['texts'][i]}")
    save_png(out / "before_after.png", contact_sheet(rows, captions))
    for label, result in (("before", before), ("after", after)):
        (out / "videos" / label).mkdir(parents=True, exist_ok=True)
        for text, frames in zip(result["orange"]["texts"], result["orange"]["frames"]):
            write_video(out / "videos" / label / f"{text.replace(' ', '_')}.mp4", enlarged(frames), fps=fps)


def plot_loss(workdir: Path, path: Path) -> tuple[float, float]:
    """Gives the mean loss of the first and of the last tenth of the steps: a single one depends on the times it drew."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from opensora_jax.training.metrics import read_jsonl

    rows = read_jsonl(workdir / "metrics.jsonl")
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = max(1, len(losses) // 10)
    means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(steps, losses, color="#c9d6e8", linewidth=1, label="each step")
    axes.plot(steps[window - 1 :], means, color="#d9730d", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", title="Fine-tuning on orange")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return means[0], means[-1]


def table(before: dict, after: dict) -> str:
    lines = [f"{'':28s}{'before':>8s}{'after':>8s}"]
    for name in ("orange", "known"):
        for key in ("colour", "shape", "direction", "background", "all"):
            a, b = before[name]["share"][key], after[name]["share"][key]
            lines.append(f"{name + ' prompts, ' + key:28s}{a:8.0%}{b:8.0%}")
    return "\n".join(lines)


def demo(out: Path, minutes: float) -> None:
    began = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    say("1. Shards of a colour that the shipped pipeline has never seen, and of the old ones")
    size = ("--size=32",)
    clips = max(32, round(96 * minutes))
    orange = ("--split=all", "--colours", "orange", f"--count={clips}")
    run("opensora_jax.data.shapes", f"--output={out}/orange", *orange, *size)
    run("opensora_jax.data.shapes", f"--output={out}/known", "--split=train", f"--count={2 * clips}", "--seed=7", *size)
    sources = f"--config.data.source=('{out}/orange','{out}/known')"
    run("opensora_jax.encode", "--config=configs/demo/finetune.py:pixels", f"--out={out}/latents", sources)
    say("2. What the shipped pipeline makes of 24 orange prompts and 24 of the old colours")
    before = sample_and_judge("tiny")
    say("3. Fine-tuning, interrupted once and resumed")
    steps = max(12, round(minutes * 125))
    train = [
        "opensora_jax.train",
        "--config=configs/demo/finetune.py",
        f"--workdir={out}/run",
        f"--export={out}/pipeline",
    ]
    train += [f"--config.steps={steps}", f"--config.data.source={out}/latents"]
    run(*train, stop_after_step=steps // 3)
    run(*train)
    say("4. The same prompts and seeds after it")
    after = sample_and_judge(str(out / "pipeline"))
    show(before, after, out)
    first, last = plot_loss(out / "run", out / "loss.png")
    shares = {
        label: {n: r["share"] for n, r in result.items()} for label, result in (("before", before), ("after", after))
    }
    (out / "judged.json").write_text(json.dumps(shares, indent=2) + "\n")
    say(f"Measured by tests/oracle.py, after {(time.monotonic() - began) / 60:.1f} minutes")
    print(table(before, after))
    print(f"{'loss, first and last tenth':28s}{first:8.3f}{last:8.3f}")
    print(f"""
before and after   {out}/before_after.png
videos             {out}/videos/before, {out}/videos/after
loss               {out}/loss.png
metrics            {out}/run/metrics.jsonl, {out}/judged.json
pipeline           python -m opensora_jax.sample --from={out}/pipeline --prompt="a orange square moving up on a dark background"
""")


# Steps a minute on two CPU cores, and the share of the time that each stage gets.
SCRATCH = {"image_vae": (250, 0.15), "vae": (150, 0.2), "stdit3": (105, 0.65)}


def scratch(out: Path, minutes: float) -> None:
    """VAE and denoiser from nothing, as the shipped pipeline was made, each for its share of the time."""
    from opensora_jax.common.contact_sheet import contact_sheet, save_png

    out.mkdir(parents=True, exist_ok=True)
    steps = {name: max(20, round(pace * share * minutes)) for name, (pace, share) in SCRATCH.items()}

    def train(name: str, config: str, *words: str) -> None:
        say(f"{name}: {steps[name]} steps")
        common = (f"--config=configs/demo/{config}", f"--workdir={out}/{name}", f"--config.steps={steps[name]}")
        run("opensora_jax.train", *common, *words)

    start = f"--config.init_from={out}/"
    vae, latents = out / "vae_pipeline", out / "latents"
    train("image_vae", "image_vae.py")
    train("vae", "vae.py", f"{start}image_vae", f"--export={vae}", "--export_dtype=float32")
    pipeline = f"--config.pipeline={vae}"
    clips = f"--config.data.source=shapes:train?count={max(256, min(12288, round(256 * minutes)))}&seed=2&size=32"
    run("opensora_jax.encode", "--config=configs/demo/stdit3.py:pixels", f"--out={latents}", pipeline, clips)
    train("stdit3", "stdit3.py", pipeline, f"--config.data.source={latents}", f"--export={out}/pipeline")
    say("Samples")
    known = sample_and_judge(str(out / "pipeline"))["known"]
    save_png(out / "samples.png", contact_sheet(known["frames"][::4], known["texts"][::4]))
    print(f"samples    {out}/samples.png\npipeline   {out}/pipeline")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=None, help="of training: 4, or 60 with --scratch")
    parser.add_argument("--out", type=Path, default=None, help="runs/demo, or runs/scratch with --scratch")
    parser.add_argument("--scratch", action="store_true", help="train VAE and denoiser from nothing")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.scratch:
        scratch(options.out or Path("runs/scratch"), options.minutes or 60)
    else:
        demo(options.out or Path("runs/demo"), options.minutes or 4)
