"""Names that users write for weights: the shipped pipeline, a folder, a training run, a Hub id.

tiny                       the pipeline that comes with the package
path/to/pipeline           a folder with model_index.json
path/to/workdir[@step]     a training run; its EMA
org/name                   a repository on the Hugging Face Hub, converted pipelines only
"""

import os
from dataclasses import dataclass
from pathlib import Path

from opensora_jax.common.errors import UserError
from opensora_jax.training import FOLDER_OF_CHECKPOINTS

ASSETS = Path(__file__).parent / "assets"
INDEX = "model_index.json"
OTHERS = ["*.h5", "*.msgpack", "*.onnx", "*.ot"]  # the same weights for other frameworks


@dataclass(frozen=True)
class Run:
    """A training run and the step of it that is meant; None: the newest."""

    workdir: str
    step: int | None


def find(source: str) -> Path | Run:
    """A pipeline folder or a training run; downloads from the Hub when the name is an id and the machine is online."""
    if folder := here(source):
        return folder
    workdir, _, step = source.partition("@")
    if step and not step.isdigit():
        raise UserError(f"{source}: after @ comes a step number, e.g. {workdir}@2000")
    if step or is_run(workdir):
        if not is_run(workdir):
            raise UserError(f"{workdir} is no training run; it has no folder {FOLDER_OF_CHECKPOINTS}")
        return Run(workdir, int(step) if step else None)
    if Path(source).exists():
        raise UserError(
            f"{source} is neither a pipeline (no {INDEX}) nor a training run (no {FOLDER_OF_CHECKPOINTS}/); "
            "convert reference weights with: python -m opensora_jax.convert --from ... --to ..."
        )
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return from_hub(source)
    raise UserError(f"{source} does not exist; give a pipeline folder, a training workdir or a Hub id (org/name)")


def here(source: str) -> Path | None:
    """The shipped pipeline or the pipeline folder of this name, if there is one; downloads nothing."""
    return next((folder for folder in (ASSETS / source, Path(source)) if (folder / INDEX).exists()), None)


def is_run(workdir: str) -> bool:
    from etils import epath

    return (epath.Path(workdir) / FOLDER_OF_CHECKPOINTS).exists()


def from_hub(name: str) -> Path:
    """A converted pipeline on the Hub."""
    folder = download(name)
    if not (folder / INDEX).exists():
        raise UserError(
            f"{name} is on the Hub but not in our layout; run: python -m opensora_jax.convert --from {name} --to DIR"
        )
    return folder


def download(name: str) -> Path:
    """The local copy of a Hub repository (org/name), or of one file or folder in it (org/name/path), fetched when this
    machine is online."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, repository, *inside = name.rstrip("/").split("/")
    chosen = "/".join(inside)
    beside = "/".join([*inside[:-1], "config.json"])  # a file's config lies with it
    wanted = [chosen, f"{chosen}/*", beside] if chosen else []
    try:
        found = (
            Path(snapshot_download(f"{owner}/{repository}", allow_patterns=wanted or None, ignore_patterns=OTHERS))
            / chosen
        )
        if not found.exists():
            raise UserError(f"{name}: {owner}/{repository} has no {chosen} (or this machine holds only a part of it)")
        return found
    except LocalEntryNotFoundError:
        cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"{name} is not on this machine and the Hub cannot be reached: on a machine that is online run "
            f"`hf download {' '.join([f'{owner}/{repository}', *wanted[:1]])}`, copy it here and pass its path (or put "
            f"it into {cache})"
        ) from None
    except HFValidationError:
        raise UserError(f"{name} does not exist, and is no Hub id (org/name)") from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{name}: the Hub answered {error.response.status_code}; check the id and your access"
        ) from None
