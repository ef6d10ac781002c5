"""One recorded case: its description, tensors, and the network that its weights make."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from opensora_jax.common.errors import UserError
from opensora_jax.nn.params import Network, Params
from opensora_jax.weights import engine, layouts

REQUIRED = {"case": str, "family": str, "config": dict, "runs": dict, "outputs": dict}


@dataclass(frozen=True)
class Adapter:
    """How a family of cases is replayed; `stem` is the house's name of the part that it exercises."""

    stem: str
    replay: Callable[["Case", str], Mapping[str, Any]] | None = None
    tables: Callable[["Case"], Iterator[tuple[str, Any, Any]]] | None = None


class Case:
    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "case.json"
        try:
            self.description = json.loads(path.read_text())
            missing = [key for key, kind in REQUIRED.items() if not isinstance(self.description.get(key), kind)]
            tables = [*self.description.get("runs", {}).values(), *self.description.get("outputs", {}).values()]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a readable case: {error}") from None
        except AttributeError:
            raise UserError(f"{path} is not a table of tables; the schema is in docs/convert.md") from None
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}, or has another kind of value; see docs/convert.md")
        if not all(isinstance(table, dict) for table in tables):
            raise UserError(f"{path}: every run and every output is a table; see docs/convert.md")
        self.name: str = self.description["case"]
        self.family: str = self.description["family"]
        self.config: dict = self.description["config"]
        self.runs: dict = self.description["runs"]
        self.data: dict = self.description.get("data") or {}

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return {}
        try:
            return load_file(path)
        except Exception as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        found = self._tensors("weights")
        if self.description.get("weights") and not found:
            raise UserError("weights.safetensors is missing; case.json says that there are weights")
        return found

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self._tensors("inputs")

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        found, said = self._tensors("outputs"), self.description["outputs"]
        if found.keys() != said.keys():
            odd = ", ".join(sorted(found.keys() ^ said.keys())[:3])
            raise UserError(f"case.json and outputs.safetensors do not name the same outputs: {odd}")
        return found

    def args(self, run: str) -> dict:
        """Non-tensor arguments of a run."""
        return self.runs[run].get("args") or {}

    def tensors(self, run: str) -> dict[str, np.ndarray]:
        """Inputs of a run: its own, and those shared by all runs."""
        shared = {name: value for name, value in self.inputs.items() if "/" not in name}
        own = {name.split("/", 1)[1]: value for name, value in self.inputs.items() if name.startswith(run + "/")}
        return shared | own

    def recorded(self, run: str) -> dict[str, str]:
        """Short output name → name in the file, for one run."""
        shared = {name: name for name in self.outputs if "/" not in name}
        return shared | {name.split("/", 1)[1]: name for name in self.outputs if name.startswith(run + "/")}

    def tolerance(self, output: str) -> dict | None:
        """Bounds of an output; None where it must be exact (some recordings say so in a word)."""
        tolerance = self.description["outputs"].get(output, {}).get("tolerance")
        return tolerance if isinstance(tolerance, dict) else None

    def load(
        self, room: str, stem: str, *, config: dict | None = None, prefix: str = "", **overrides
    ) -> tuple[Network, Params, Any]:
        """Builds `opensora_jax.<room>.<stem>` for the case's weights, as convert would. Returns network, params, Config."""
        weights = {name[len(prefix) :]: value for name, value in self.weights.items() if name.startswith(prefix)}
        key = (room, stem, prefix, json.dumps([config, overrides], sort_keys=True, default=str))
        cache = self.__dict__.setdefault("_loaded", {})
        if key not in cache:
            cache[key] = load_network(room, stem, weights, self.config if config is None else config, **overrides)
        return cache[key]


def load_network(room: str, stem: str, weights: Mapping[str, np.ndarray], config: dict, **overrides):
    """A network and its parameters from reference tensors in memory."""
    model = importlib.import_module(f"opensora_jax.{room}.{stem}")
    table = importlib.import_module(f"opensora_jax.weights.{stem}")
    found = {name: array.shape for name, array in weights.items()}
    joined = layouts.joined(found, layouts.of(table, found, config))
    shapes, read = joined.shapes, lambda name: joined.read(weights.__getitem__, name)
    cfg = model.Config(**(table.config_from(shapes, config) | overrides))
    network = Network.of(lambda rngs: model.build(cfg, rngs=rngs))
    wanted = {path: leaf.shape for path, leaf in engine.flatten(network.abstract).items()}
    plan = engine.plan(shapes, wanted, table.RULES)
    params = engine.unflatten({path: jax.numpy.asarray(a) for path, a in plan.arrays(read)})
    return network, params, cfg


def channels_last(x):
    """[B, C, ...] → [B, ..., C]."""
    return None if x is None else np.moveaxis(np.asarray(x), 1, -1)


def channels_first(x):
    """[B, ..., C] → [B, C, ...]."""
    return np.moveaxis(np.asarray(x), -1, 1)
