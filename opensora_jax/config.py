"""Configuration: an ml_collections file plus command-line overrides, turned into frozen dataclasses.

    --config=configs/stage3.py            a file whose get_config() returns a ConfigDict
    --config=configs/stage3.py:variant    get_config("variant")
    --config.optimizer.learning_rate=1e-4 --config.model.depth=12

Every key must be a field of a dataclass below (or of the network that `model.family` names); an unknown key, a wrong
type, a missing file is one sentence that names the nearest right thing.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from opensora_jax.common.errors import UserError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One network of a system: its room and family (a file of ours), and that file's Config."""

    room: str
    family: str
    config: Any

    @property
    def module(self) -> Any:
        return importlib.import_module(f"opensora_jax.{self.room}.{self.family}")

    def network(self):
        from opensora_jax.nn.params import Network

        return Network.of(lambda rngs: self.module.build(self.config, rngs=rngs))

    def describe(self) -> dict:
        return {"family": self.family} | to_plain(self.config)


def families(room: str) -> list[str]:
    """The architectures of a room: its files that offer build() and a Config."""
    names = sorted(path.stem for path in (PACKAGE / room).glob("[a-z]*.py"))
    return [name for name in names if "\ndef build(" in (PACKAGE / room / f"{name}.py").read_text()]


def part(room: str, spec: Mapping, where: str) -> Part:
    """{"family": "stdit3", "preset": "STDiT3-XL/2", "depth": 2} → the preset with depth 2."""
    spec = dict(spec)
    family, preset = spec.pop("family", None), spec.pop("preset", None)
    known = families(room)
    if family not in known:
        raise UserError(f"{where}.family={family!r} is unknown{nearest(family, known)}; there are {', '.join(known)}")
    module = importlib.import_module(f"opensora_jax.{room}.{family}")
    if preset is not None and preset not in module.PRESETS:
        hint = nearest(preset, module.PRESETS)
        raise UserError(f"{where}.preset={preset!r} is unknown{hint}; {family} has {', '.join(module.PRESETS)}")
    base = module.PRESETS[preset] if preset else module.Config()
    return Part(room, family, build(type(base), to_plain(base) | spec, where))


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence, and --config.a.b=VALUE goes to the configuration."""

    def __init__(self, entry: str, description: str, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        kwargs = {"allow_abbrev": False, "formatter_class": formatter} | kwargs
        super().__init__(prog=f"python -m opensora_jax.{entry}", description=description, **kwargs)
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, argv=None) -> tuple[argparse.Namespace, list[str]]:
        """Flags, and the --config.key=value overrides."""
        args, rest = self.parse_known_args(argv)
        flags = [option for action in self._actions for option in action.option_strings]
        for word in rest:
            if not word.startswith("--config."):
                raise UserError(f"{word} is not a flag{nearest(word.partition('=')[0], flags)}; see {self.prog} --help")
        return args, rest


def load(file: str | None, overrides: list[str]) -> dict:
    """The plain configuration tree of a file with the command line's changes."""
    if not file:
        raise UserError(f"--config=FILE is missing; shipped: {', '.join(shipped())}")
    return changed(read_file(file), overrides)


def changed(tree: dict, overrides: list[str]) -> dict:
    """A tree with the command line's --config.key=value."""
    for word in overrides:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"{word}: write --config.{key}=VALUE")
        override(tree, key, text)
    return tree


def read_file(name: str) -> dict:
    path_text, _, variant = name.partition(":")
    path = find_file(path_text)
    _make_configs_importable()
    spec = importlib.util.spec_from_file_location(f"configs_file_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        where = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}{where}: {type(error).__name__}: {error}") from error
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def find_file(name: str) -> Path:
    """A path as given, or one of the configs that travel with the package."""
    candidates = [Path(name)]
    if name.startswith("configs/"):
        candidates += [root / Path(name).relative_to("configs") for root in roots()]
    for path in candidates:
        if path.is_file():
            return path
    hint = nearest(name, shipped()) or f"; shipped: {', '.join(shipped())}"
    raise UserError(f"no config file {name}{hint}")


def roots() -> list[Path]:
    """Where configs lie: beside the package in a checkout, inside it when installed."""
    return [root for root in (PACKAGE.parent / "configs", PACKAGE / "_configs") if (root / "base.py").is_file()]


def shipped() -> list[str]:
    found = [path.relative_to(root) for root in roots()[:1] for path in root.rglob("*.py")]
    return sorted(f"configs/{path.as_posix()}" for path in found if path.name not in ("base.py", "__init__.py"))


def _make_configs_importable() -> None:
    """Config files say `from configs import base`; outside a checkout that is the folder inside the package."""
    if "configs" in sys.modules:
        return
    package = types.ModuleType("configs")
    package.__path__ = [str(root) for root in roots()[:1]]
    sys.modules["configs"] = package


def override(tree: dict, key: str, text: str) -> None:
    """Sets a.b.c to a value written as a Python literal, or as bare text."""
    *parents, leaf = key.split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if node is None:
            node = tree[parent] = {}
        if not isinstance(node, dict):
            raise UserError(f"--config.{key}: {parent} is a value, not a group of keys")
        tree = node
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    tree[leaf] = value


def build(cls: type, values: Mapping, where: str) -> Any:
    """A frozen dataclass from a mapping; every key and type is checked."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in names:
            hint = nearest(key, names) or f"; {where} has {', '.join(names)}"
            raise UserError(f"{where}.{key} is not a configuration key{hint}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(kind, value, where: str):
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = [option for option in arguments if option is not type(None)]
        for option in others:
            with contextlib.suppress(UserError):
                return _convert(option, value, where)
        return _convert(last, value, where)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return build(kind, value, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        if inner is None and len(value) != len(arguments):
            raise UserError(f"{where} takes {len(arguments)} values, got {value!r}")
        return tuple(_convert(inner or arguments[i], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is list and isinstance(value, (list, tuple)):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin in (dict, Mapping) or kind in (dict, Mapping):
        if value is None or isinstance(value, Mapping):
            return dict(value or {})
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(
            f"{where}={value!r} is unknown{nearest(value, arguments)}; choose one of {', '.join(map(str, arguments))}"
        )
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = getattr(kind, "__name__", None) if not arguments else None
    raise UserError(
        f"{where} must be {name or str(kind).replace('typing.', '')}, got {value!r} ({type(value).__name__})"
    )


def to_plain(value) -> Any:
    """Dataclasses, tuples and mappings as what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def nearest(name, options) -> str:
    close = get_close_matches(str(name), [str(option) for option in options], 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""
