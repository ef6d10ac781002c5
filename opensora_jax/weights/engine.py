"""Between a reference checkpoint's names and our parameter paths: one table of rules a network, read in both directions.

    RULES = [
        *linear("blocks.{layer}.attn.qkv", "blocks/attn/qkv"),      # {layer} is absent on the right: a stacked axis
        copy("blocks.{layer}.scale_shift_table", "blocks/scale_shift_table"),
        drop("pos_embed"),                                          # derived: we compute it ourselves
        tied("encoder.embed_tokens.weight", "shared/embedding"),    # the same tensor under a second name
    ]

`{name}` on the left stands for a number, `{name:a|b}` for one of some words. Placeholders that the right side does not
repeat are stacked, in order, as leading axes. Every reference key must match exactly one rule and every parameter of
ours must be filled: anything else is a MappingError that lists all of it, and nothing is loaded.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property

import numpy as np

from opensora_jax.common.errors import UserError

Shape = tuple[int, ...]


class MappingError(UserError):
    """A checkpoint does not fit the network."""


@dataclass(frozen=True)
class Transform:
    """Reference array → ours, and exactly back. Shapes travel the same way."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]

    def shape(self, shape: Shape) -> Shape | None:
        """Our shape, found on an array that holds no memory; None where there are too few axes for one."""
        try:
            return self.forward(np.broadcast_to(np.int8(0), shape)).shape
        except (ValueError, IndexError):
            return None


COPY = Transform("copy", lambda a: a, lambda a: a)
LINEAR = Transform("linear", lambda a: a.T, lambda a: a.T)  # [out, in] ↔ [in, out]
CONV = Transform(  # [O, I, *kernel] ↔ [*kernel, I, O]
    "conv",
    lambda a: np.moveaxis(a, (0, 1), (-1, -2)),
    lambda a: np.moveaxis(a, (-1, -2), (0, 1)),
)
CONV_TRANSPOSE = Transform(  # [I, O, *kernel] ↔ [*kernel, I, O]
    "conv_transpose",
    lambda a: np.moveaxis(a, (0, 1), (-2, -1)),
    lambda a: np.moveaxis(a, (-2, -1), (0, 1)),
)


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow `prefix.` in names; not the largest, so that no name makes us build a billion layers."""
    start = len(prefix) + 1
    return len({name[start:].partition(".")[0] for name in names if name.startswith(prefix + ".")})


def reshape(name: str, forward: Callable, back: Callable) -> Transform:
    """A transform of a family's own, when the reference keeps unit axes or an odd order."""
    return Transform(name, forward, back)


@dataclass(frozen=True)
class Rule:
    source: str
    target: str | None  # None: dropped
    transform: Transform = COPY
    tied: bool = False

    @cached_property
    def placeholders(self) -> list[str]:
        return re.findall(r"\{(\w+)(?::[^}]*)?\}", self.source)

    @cached_property
    def stacked(self) -> list[str]:
        return [name for name in self.placeholders if f"{{{name}}}" not in (self.target or "")]

    @cached_property
    def source_pattern(self) -> re.Pattern:
        return pattern(self.source)

    @cached_property
    def target_pattern(self) -> re.Pattern:
        return pattern(_with_choices(self.target or "", self.source))

    def source_name(self, values: Mapping[str, str]) -> str:
        return named(self.source, values)


def copy(source: str, target: str) -> Rule:
    return Rule(source, target)


def drop(source: str) -> Rule:
    return Rule(source, None)


def tied(source: str, target: str, transform: Transform = COPY) -> Rule:
    return Rule(source, target, transform, tied=True)


def linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", LINEAR), Rule(f"{source}.bias", f"{target}/bias")]


def conv(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", CONV), Rule(f"{source}.bias", f"{target}/bias")]


def norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def embed(source: str, target: str) -> Rule:
    return Rule(f"{source}.weight", f"{target}/embedding")


def mlp(source: str, target: str) -> list[Rule]:
    return linear(f"{source}.fc1", f"{target}/fc1") + linear(f"{source}.fc2", f"{target}/fc2")


def within(source: str, target: str, rules: list[Rule]) -> list[Rule]:
    """The rules of a part, seen from the whole: prefixes on both sides."""
    return [
        Rule(source + rule.source, None if rule.target is None else target + rule.target, rule.transform, rule.tied)
        for rule in rules
    ]


@dataclass
class Assignment:
    """Where one of our parameters comes from: its sources by stack index."""

    path: str
    shape: Shape
    rule: Rule
    sources: dict[tuple[int, ...], str] = field(default_factory=dict)

    def pieces(self, read: Callable[[str], np.ndarray], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The parameter's layers in the order in which they are stacked; the one array where none are."""
        for _, name in sorted(self.sources.items()):
            yield np.asarray(self.rule.transform.forward(read(name)), dtype, order="C")


@dataclass
class Plan:
    assignments: list[Assignment]
    dropped: list[str]
    tied: list[tuple[str, str]]  # (reference name, our path)

    def pieces(
        self, read: Callable[[str], np.ndarray], dtypes: Mapping[str, np.dtype] | None = None
    ) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Our parameters one at a time, each as its layers in order (or as one piece), so that only one reference tensor
        is in memory; of these dtypes by path, or as they are."""
        for item in self.assignments:
            yield item.path, item.pieces(read, dtypes and dtypes[item.path])

    def arrays(self, read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters one at a time, each in one host buffer."""
        for item in self.assignments:
            pieces = item.pieces(read)
            yield item.path, np.stack(list(pieces)).reshape(item.shape) if item.rule.stacked else next(pieces)


def plan(found: Mapping[str, Shape], wanted: Mapping[str, Shape], rules: list[Rule], where: str = "checkpoint") -> Plan:
    """Matches reference names and shapes to our paths and shapes; raises with everything that does not fit."""
    problems: list[str] = []
    assignments: dict[str, Assignment] = {}
    dropped, tied_names = [], []
    for name, shape in found.items():
        hits = [(rule, match) for rule in rules if (match := rule.source_pattern.fullmatch(name))]
        if len(hits) != 1:
            problems.append(_unmatched(name, shape, [rule.source for rule, _ in hits], rules))
            continue
        rule, match = hits[0]
        if rule.target is None:
            dropped.append(name)
            continue
        path = rule.target.format(**match.groupdict())
        if rule.tied:
            tied_names.append((name, path))
            continue
        if path not in wanted:
            near = get_close_matches(path, wanted, 2)
            problems.append(f"{name} {list(shape)}: our network has no {path}{_near(near)}")
            continue
        index = tuple(int(match[key]) for key in rule.stacked)
        ours = rule.transform.shape(tuple(shape))
        full = tuple(wanted[path])
        lead = len(index)
        if full[lead:] != ours or any(i >= size for i, size in zip(index, full)):
            expect = rule.transform.back(np.broadcast_to(np.int8(0), full[lead:])).shape if len(full) >= lead else full
            layers = f" and has {list(full[:lead])} layers" if lead else ""
            problems.append(f"{name}: shape {list(shape)}, but {path} takes {list(expect)}{layers}")
            continue
        assignment = assignments.setdefault(path, Assignment(path, full, rule))
        if index in assignment.sources:
            problems.append(f"{name}: {path} is already filled by {assignment.sources[index]}")
        assignment.sources[index] = name
    problems += _missing(assignments, wanted, rules)
    if problems:
        shown = problems[:40] + ([f"... and {len(problems) - 40} more"] if len(problems) > 40 else [])
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MappingError(f"{where} does not fit: {count}\n  " + "\n  ".join(shown))
    order = {path: i for i, path in enumerate(wanted)}
    return Plan(sorted(assignments.values(), key=lambda a: order[a.path]), dropped, tied_names)


def reference_arrays(
    ours: Mapping[str, Shape], read: Callable[[str], np.ndarray], rules: list[Rule]
) -> Iterator[tuple[str, np.ndarray]]:
    """The way back: our parameters under the reference's names and in its layouts."""
    for path in ours:
        rule, match = _rule_of(path, rules)
        array = read(path)
        lead = len(rule.stacked)
        for index in np.ndindex(*array.shape[:lead]):
            values = match.groupdict() | dict(zip(rule.stacked, index))
            yield rule.source_name(values), np.ascontiguousarray(rule.transform.back(array[index]))


def _rule_of(path: str, rules: list[Rule]) -> tuple[Rule, re.Match]:
    for rule in rules:
        if rule.target is not None and not rule.tied and (match := rule.target_pattern.fullmatch(path)):
            return rule, match
    raise MappingError(f"no rule leads back from our parameter {path}")


def named(template: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)(?::[^}]*)?\}", lambda m: str(values[m[1]]), template)


@cache
def pattern(template: str) -> re.Pattern:
    parts, seen = [], set()
    for piece in re.split(r"(\{[^}]*\})", template):
        if not piece.startswith("{"):
            parts.append(re.escape(piece))
            continue
        name, _, choices = piece[1:-1].partition(":")
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{choices or '[0-9]+'})")
        seen.add(name)
    return re.compile("".join(parts))


def _with_choices(target: str, source: str) -> str:
    """The target's bare {name} with the choices that the source gives for it."""
    choices = dict(re.findall(r"\{(\w+):([^}]*)\}", source))
    return re.sub(r"\{(\w+)\}", lambda m: f"{{{m[1]}:{choices[m[1]]}}}" if m[1] in choices else m[0], target)


def _unmatched(name, shape, hits, rules) -> str:
    if hits:
        return f"{name} {list(shape)}: matches {len(hits)} rules ({', '.join(hits)})"
    near = get_close_matches(name, [rule.source for rule in rules], 2, 0.5)
    return f"{name} {list(shape)}: unknown{_near(near)}"


def _missing(assignments, wanted, rules) -> Iterator[str]:
    for path, shape in wanted.items():
        assignment = assignments.get(path)
        rule, match = (assignment.rule, None) if assignment else _rule_of(path, rules)
        lead = shape[: len(rule.stacked)]
        values = match.groupdict() if match else rule.target_pattern.fullmatch(path).groupdict()
        for index in np.ndindex(*lead):
            if assignment is None or index not in assignment.sources:
                yield f"{rule.source_name(values | dict(zip(rule.stacked, index)))}: missing (fills {path})"


def _near(candidates) -> str:
    return f"; nearest: {', '.join(candidates)}" if candidates else ""


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """{"a": {"b": x}} → {"a/b": x}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, path + "/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
