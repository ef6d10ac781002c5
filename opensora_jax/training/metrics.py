"""Where numbers go: metrics.jsonl always, TensorBoard, optionally Weights & Biases. One background thread writes.

The methods carry clu.metric_writers' names (which cannot be imported without TensorFlow).
"""

import json
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from opensora_jax.common.progress import say


class MetricWriter:
    """Writes on process 0 only; a failing back end is reported once and left out, it never stops a run."""

    def __init__(self, workdir, *, tensorboard: bool = True, wandb_project: str = "", config: dict | None = None):
        self.workdir = epath.Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._sinks = [_JsonLines(self.workdir / "metrics.jsonl")]
        if tensorboard:
            self._sinks.append(_TensorBoard(self.workdir / "tensorboard"))
        if wandb_project:
            self._sinks.append(_Wandb(wandb_project, self.workdir, config or {}))
        self._queue: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._drain, name="metrics", daemon=True)
        self._thread.start()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._queue.put(("scalars", step, {key: float(value) for key, value in scalars.items()}))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._queue.put(("texts", step, dict(texts)))

    def write_images(self, step: int, images: Mapping) -> None:
        """uint8 [H, W, 3] arrays."""
        self._queue.put(("images", step, dict(images)))

    def flush(self) -> None:
        done = threading.Event()
        self._queue.put(("flush", 0, done))
        done.wait(30)

    def close(self) -> None:
        self.flush()
        self._queue.put(None)
        self._thread.join(30)

    def _drain(self):
        while (item := self._queue.get()) is not None:
            kind, step, payload = item
            for sink in list(self._sinks):
                try:
                    sink.flush() if kind == "flush" else getattr(sink, kind)(step, payload)
                except Exception as error:
                    self._sinks.remove(sink)
                    say(f"metrics: {type(sink).__name__[1:]} stopped ({error}); the run goes on")
            if kind == "flush":
                payload.set()


class _Sink:
    def scalars(self, step, scalars): ...
    def texts(self, step, texts): ...
    def images(self, step, images): ...
    def flush(self): ...


class _JsonLines(_Sink):
    def __init__(self, path):
        self.path = path
        self.local = not str(path).startswith(("gs://", "s3://"))
        self.lines: list[str] = []

    def scalars(self, step, scalars):
        self.lines.append(json.dumps({"step": step, "time": round(time.time(), 3)} | scalars))
        if self.local or len(self.lines) >= 100:
            self.flush()

    def flush(self):
        if not self.lines:
            return
        text = "".join(line + "\n" for line in self.lines)
        self.lines = []
        if self.local:
            with open(self.path, "a") as file:
                file.write(text)
        else:  # object stores cannot append
            before = self.path.read_text() if self.path.exists() else ""
            self.path.write_text(before + text)


class _TensorBoard(_Sink):
    def __init__(self, folder):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), flush_secs=30)

    def scalars(self, step, scalars):
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def texts(self, step, texts):
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def images(self, step, images):
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def flush(self):
        self.writer.flush()


class _Wandb(_Sink):
    def __init__(self, project, workdir, config):
        try:
            import wandb
        except ImportError:
            from opensora_jax.common.errors import UserError

            raise UserError(
                "log.wandb_project is set, but wandb is not installed: pip install 'opensora-jax[wandb]'"
            ) from None
        self.wandb = wandb
        self.run = wandb.init(project=project, name=Path(str(workdir)).name, config=config, resume="allow")

    def scalars(self, step, scalars):
        self.run.log(scalars, step=step)

    def images(self, step, images):
        self.run.log({name: self.wandb.Image(image) for name, image in images.items()}, step=step)


def read_jsonl(path) -> list[dict]:
    """The rows of metrics.jsonl, the last of each step; a line cut short by a kill is left out."""
    rows: dict[int, dict] = {}
    for line in epath.Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]
