"""Checkpoints: one unit of items params, ema, opt, meta, data, written asynchronously by Orbax, and the init ladder.

`meta` holds step, seed and config; `data` the global cursor of the loader. A step's folder gets its final name only
when everything in it is on disk. The ladder, in order: resume this run > resume another (`resume_from`) > start from
weights (`init_from`) > scratch.
"""

import errno
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from opensora_jax.common.errors import UserError
from opensora_jax.training import FOLDER_OF_CHECKPOINTS


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 3  # newest ones
    keep_every_steps: int = 0  # besides, each multiple of this for good; 0: none
    asynchronous: bool = True


class Checkpoints:
    def __init__(self, workdir, cfg: CheckpointConfig = CheckpointConfig(), *, read_only: bool = False):
        workdir = str(workdir)
        self.folder = epath.Path(workdir if "://" in workdir else os.path.abspath(workdir)) / FOLDER_OF_CHECKPOINTS
        self.cfg = cfg
        if read_only and not self.folder.exists():
            raise UserError(f"{workdir} holds no checkpoints; expected the folder {self.folder}")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.keep or None,
            keep_period=cfg.keep_every_steps or None,
            enable_async_checkpointing=cfg.asynchronous and not read_only,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        try:
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror or error}") from None

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, state: dict, meta: dict, data: dict) -> None:
        step = int(state["step"])
        if step in self.manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(state[name]) for name in ("params", "ema", "opt")}
        items |= {"meta": ocp.args.JsonSave(meta | {"step": step}), "data": ocp.args.JsonSave(data)}
        _hush_writers()
        try:
            self.manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # its own, or that of an earlier one which was written meanwhile
            raise self._unfinished(error) from error

    def restore(self, abstract: dict, step: int | None = None) -> tuple[dict, dict, dict]:
        """The whole state on the mesh that `abstract` names, whatever mesh it was saved from; meta; data cursor."""
        step = self._existing(step)
        items = {name: ocp.args.StandardRestore(abstract[name]) for name in ("params", "ema", "opt")}
        items |= {"meta": ocp.args.JsonRestore(), "data": ocp.args.JsonRestore()}
        found = self._read(step, items)
        state = {name: found[name] for name in ("params", "ema", "opt")}
        state["step"] = jax.device_put(jax.numpy.int32(found["meta"]["step"]), abstract["step"].sharding)
        return state, dict(found["meta"]), dict(found["data"])

    def restore_item(self, name: str, abstract, step: int | None = None):
        """One item alone, e.g. the EMA for sampling."""
        return self._read(self._existing(step), {name: ocp.args.StandardRestore(abstract)})[name]

    def meta(self, step: int | None = None) -> dict:
        return dict(self._read(self._existing(step), {"meta": ocp.args.JsonRestore()})["meta"])

    def wait(self) -> None:
        """Until what was saved is on disk; a full disk or a lost mount shows here."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._unfinished(error) from error

    def _unfinished(self, error: Exception) -> UserError:
        gc.collect()  # what the broken save left half done, while nobody looks
        whole = f"the last whole one is step {self.latest()}" if self.steps() else "there is no whole one yet"
        return UserError(
            f"could not finish a checkpoint in {self.folder}: {_reason(error)}; {whole}: mend that, then give the same "
            "command again"
        )

    def close(self) -> None:
        self.wait()
        self.manager.close()

    def climb(self, abstract: dict, *, resume_from: str, weights: Callable | None, scratch: Callable):
        """The init ladder → (state, meta or None, data cursor or None, how). Only the first two carry a position."""
        if self.latest() is not None:
            return *self.restore(abstract), f"resumed step {self.latest()} of {self.folder.parent}"
        if resume_from:
            workdir, _, step = resume_from.partition("@")
            other = Checkpoints(workdir, read_only=True)
            return *other.restore(abstract, int(step) if step else None), f"continued {resume_from}"
        if weights is not None:
            params, source = weights()
            return scratch(params), None, None, f"started from the weights of {source}"
        return scratch(None), None, None, "started from scratch"

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no finished checkpoint")
        if step is not None and step not in steps:
            raise UserError(f"{self.folder} has no step {step}; it has {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _read(self, step: int, items: dict) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0][:300]
            raise UserError(f"{self.folder}/{step} does not fit this config's model or optimizer: {first}") from None


def _reason(error: Exception) -> str:
    """What the system said, out of the nested sentences of TensorStore."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE):
        if os.strerror(code) in text:
            return os.strerror(code)
    return text.strip().splitlines()[0][:300]


@functools.cache
def _hush_writers() -> None:
    """A save that fails raises where it is waited for, and we say so. Before that Orbax and TensorStore print it a
    hundred times, from threads that cannot know (orbax 0.12, November 2026); `--debug` lets them."""
    if "--debug" in sys.argv:
        return
    logging.getLogger("absl").addFilter(lambda said: "orbax" not in said.pathname or said.levelno < logging.ERROR)
    logging.getLogger("asyncio").addFilter(lambda said: "never retrieved" not in said.getMessage())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    unraisable = sys.unraisablehook

    def hook(given):
        late = str(given.exc_value) == "Event loop is closed"  # a write that ends after the save was given up
        if not late and "orbax" not in str(getattr(given.object, "cr_code", "")):
            unraisable(given)

    sys.unraisablehook = hook
