"""What happens around a step: numbers on screen and on disk, and leaving cleanly when the machine is taken away."""

import signal
import time

import jax

from opensora_jax.common.clock import Stopwatch
from opensora_jax.common.errors import UserError
from opensora_jax.common.progress import Progress, say

# Dense bf16 peak by device kind, FLOP/s: data sheets of the vendors (November 2026).
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 2307e12,
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12,
}  # fmt: skip


def peak_flops(device) -> float | None:
    """The longest name that the device's kind contains wins ("TPU v5 lite" before "TPU v5")."""
    names = [name for name in PEAKS if name in device.device_kind]
    return PEAKS[max(names, key=len)] if names else None


class Reporter:
    """Collects a step's metrics one step late, so that the device is never waited for, and reports every n steps."""

    def __init__(self, writer, cfg, *, start: int):
        """writer: None on all processes but the first, which then stay silent."""
        self.writer, self.every, self.max_bad_steps = writer, cfg.log.every_steps, cfg.max_bad_steps
        self.watch, self.bad_in_a_row = Stopwatch(), 0
        self.pending: tuple | None = None
        self.steps = self.tokens = 0
        self.flops = 0.0
        self.bar = Progress("train", cfg.steps, start=start, quiet=writer is None)
        peak = peak_flops(jax.devices()[0])
        self.peak = peak and peak * jax.device_count()

    def step(self, step: int, metrics: dict, *, tokens: int, flops: float) -> None:
        """`step` counts finished updates; tokens and flops are those of the whole batch."""
        self.steps, self.tokens, self.flops = self.steps + 1, self.tokens + tokens, self.flops + flops
        self._finish()
        self.pending = (step, metrics)
        self.bar.update()
        if step % self.every == 0 or step == self.bar.total:
            self._finish(report=True)

    def _finish(self, report: bool = False) -> None:
        if self.pending is None:
            return
        step, metrics = self.pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.pending = None
        self.bad_in_a_row = 0 if values["finite"] else self.bad_in_a_row + 1
        if not values["finite"]:
            self.bar.write(f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; update skipped")
        if self.bad_in_a_row >= self.max_bad_steps:
            raise UserError(
                f"{self.bad_in_a_row} steps in a row up to {step} were not finite; the parameters are those before them. "
                "Lower optimizer.learning_rate, check the data, or set model.dtype=float32"
            )
        if report or step % self.every == 0:
            self._report(step, values)

    def _report(self, step: int, values: dict) -> None:
        seconds, spans = self.watch.collect()
        speed = {"steps_per_second": self.steps / seconds, "tokens_per_second": self.tokens / seconds}
        speed["data_wait_share"] = spans.get("data", 0.0) / seconds
        if self.peak and self.flops:
            speed["mfu"] = self.flops / seconds / self.peak
        self.steps = self.tokens = 0
        self.flops = 0.0
        speed["eta_seconds"] = self.bar.eta
        if self.writer is None:
            return
        self.writer.write_scalars(step, {k: v for k, v in (values | speed).items() if k != "finite"})
        mfu = f"  mfu {speed['mfu']:.0%}" if "mfu" in speed else ""
        self.bar.update(
            0,
            f"loss {values['loss']:.4f}  grad {values['grad_norm']:.2f}  {speed['steps_per_second']:.2f} steps/s  "
            f"{speed['tokens_per_second']:,.0f} tok/s{mfu}  wait {speed['data_wait_share']:.0%}",
        )

    def close(self) -> None:
        self._finish(report=True)
        self.bar.__exit__(None)
        if self.writer is not None:
            self.writer.close()


class Stopper:
    """SIGTERM (a preempted machine, SLURM's time limit) asks for a last checkpoint; the run then exits with 0."""

    def __init__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self.asked = True
        say("SIGTERM: saving and leaving after this step")

    def restore(self):
        signal.signal(signal.SIGTERM, self.before)


class Every:
    """True on each n-th step; 0 means never."""

    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, step: int) -> bool:
        return bool(self.steps) and step % self.steps == 0


class Profiler:
    """A jax.profiler trace of the steps first..last."""

    def __init__(self, steps: tuple[int, ...], folder):
        self.steps, self.folder, self.running = steps, str(folder), False

    def __call__(self, step: int) -> None:
        if self.steps and step == self.steps[0] and not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif self.running and step > self.steps[-1]:
            jax.profiler.stop_trace()
            self.running = False
            steps = f"{self.steps[0]}-{self.steps[-1]}"
            say(f"profile of steps {steps}: {self.folder} ({time.strftime('%H:%M:%S')})")
