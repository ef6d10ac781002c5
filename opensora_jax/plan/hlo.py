"""What a compiled TPU program holds, read from its optimized HLO text: cycles, kernels, collectives.

`cost_analysis()` counts the body of a loop once; here everything inside a `while` counts as often as it runs. Custom
calls carry metadata with raw newlines and braces, so an instruction ends where the next one begins, not at a brace.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
# Outside fusions; a reshape that is left moves data. The compiler's cycles for them are none, or 10 to 20 times those of their
# own static schedules (libtpu 0.0.51, v6e), which take less than their traffic does.
MOVES = ("copy", "reduce", "reshape")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9](?:fn)?)?)\[([0-9,]*)\]")
START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
OFFLOADED = re.compile(r"called_computations=\{%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    rest: str  # operands and attributes
    root: bool = False

    @property
    def cycles(self) -> int:
        found = CYCLES.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def is_kernel(self) -> bool:
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.rest


@dataclass(frozen=True)
class Module:
    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def types(self) -> dict[str, str]:
        """Of all instructions: names are unique in a module."""
        return {op.name: op.type for computation in self.computations.values() for op in computation}

    def traffic(self, op: Instruction) -> int:
        """Bytes that an instruction reads and writes; an array that it takes twice is counted once."""
        written = [op.type, *(self.types.get(name, "") for name in dict.fromkeys(op.operands))]
        return sum(size for text in written for _, size in arrays(text))

    def alike(self) -> dict[str, list[str]]:
        """Of each kernel's instruction: all of its kind that take and give arrays of the same shapes."""
        found: dict[tuple, list[str]] = {}
        for op in (op for computation in self.computations.values() for op in computation if op.is_kernel):
            shapes = [ARRAY.findall(text) for text in (op.type, *(self.types.get(name, "") for name in op.operands))]
            found.setdefault((re.sub(r"\.\d+$", "", op.name), str(shapes)), []).append(op.name)
        return {name: names for names in found.values() for name in names}

    def walk(self, name: str = "", times: int = 1, fused: bool = False) -> Iterator[tuple[Instruction, int, bool]]:
        """Every instruction that runs, of the program or one computation: with how often, and whether it lies inside a
        fusion."""
        for op in self.computations.get(name or self.entry, ()):
            yield op, times, fused
            for inner in self.called(op):
                yield from self.walk(inner, times * self.repeats(op), fused or op.opcode == "fusion")

    def called(self, op: Instruction) -> list[str]:
        """Computations that run where an instruction stands."""
        if op.opcode == "while":
            return [_attribute(op, "body")]
        if op.opcode not in ("fusion", "call", "async-start", "conditional"):
            return []
        branches = BRANCHES.search(op.rest)
        return re.findall(r"[\w.\-]+", branches[1]) if branches else CALLED.findall(op.rest)

    def repeats(self, op: Instruction) -> int:
        """Trips of a loop: as the compiler says, or the constant that its condition compares the counter with."""
        if op.opcode != "while":
            return 1
        known = TRIPS.search(op.rest)
        if known:
            return int(known[1])
        constants = [
            int(found[1])
            for op in self.computations.get(_attribute(op, "condition"), ())
            if op.opcode == "constant" and (found := re.match(r"(\d+)\)", op.rest))
        ]
        return max(constants, default=1)

    def offloaded(self, start: Instruction) -> Instruction | None:
        """The collective that an `async-start` gives to the sparse cores; it stands behind two calls."""
        for outer in self.called(start):
            for call in self.computations.get(outer, ()):
                for inner in OFFLOADED.findall(call.rest):
                    found = [op for op in self.computations.get(inner, ()) if op.opcode in COLLECTIVES]
                    if found:
                        return found[0]
        return None


@dataclass(frozen=True)
class Collective:
    """One kind of exchange: over which mesh axes, how often a step, and the bytes of one operand on one device."""

    kind: str
    axes: tuple[str, ...]
    size: int  # devices that exchange with each other
    dtype: str
    bytes: float  # of the full array: gathered, reduced or exchanged
    count: int = 1
    asynchronous: bool = False
    rings: int = 0  # of all its devices, a link each, that the sparse cores send it along; 0: every link of their box

    @property
    def moved(self) -> float:
        """Bytes that a device sends in a step."""
        share = (self.size - 1) / self.size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.count * self.bytes * factor


@dataclass(frozen=True)
class Contents:
    """Of a step on one device."""

    cycles: int  # of everything but kernels, collectives and moves
    traffic: int = 0  # bytes of the moves
    kernel_calls: dict[str, int] = field(default_factory=dict)  # by the instruction's name
    collectives: tuple[Collective, ...] = ()


def parse(text: str) -> Module:
    computations: dict[str, list[Instruction]] = {}
    entry, current, pending = "", None, None

    def finish():
        if pending is not None and current is not None:
            computations[current].append(_instruction(pending))

    for line in text.splitlines():
        header = HEADER.match(line)
        if header and not line.startswith(" "):
            finish()
            pending, current = None, header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current is not None and START.match(line):
            finish()
            pending = line
        elif pending is not None and line != "}":
            pending += "\n" + line
    finish()
    return Module(computations, entry or next(iter(computations), ""))


def contents(module: Module, axis_sizes: dict[str, int]) -> Contents:
    """axis_sizes: the mesh, in the order in which partitions are numbered."""
    cycles, traffic, kernels = 0, 0, {}
    found: dict[Collective, int] = {}
    for op, times, fused in module.walk():
        collective = collective_of(op, module, axis_sizes, fused)
        if collective is not None:
            found[collective] = found.get(collective, 0) + times
        elif op.is_kernel:
            kernels[op.name] = kernels.get(op.name, 0) + times
        elif not fused and op.opcode in MOVES:
            traffic += module.traffic(op) * times
        elif not fused:
            cycles += op.cycles * times
    collectives = (replace(collective, count=count) for collective, count in found.items())
    return Contents(cycles, traffic, kernels, tuple(sorted(collectives, key=lambda c: -c.moved)))


def exchanges(op: Instruction, module: Module, axis_sizes: dict[str, int]) -> list[Collective]:
    """What an instruction is or starts to send, or sends inside its fusion."""
    inside = [(op, False)]
    if op.opcode == "fusion":
        inside = [(inner, fused) for called in module.called(op) for inner, _, fused in module.walk(called, fused=True)]
    found = (collective_of(inner, module, axis_sizes, fused) for inner, fused in inside)
    return [collective for collective in found if collective is not None]


def arrays(type_text: str) -> list[tuple[str, int]]:
    """(dtype, bytes) of every array in a type; layouts such as {1,0:T(8,128)(2,1)} hold no brackets."""
    return [
        (dtype, BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n))
        for dtype, dims in ARRAY.findall(type_text)
        if dtype in BYTES
    ]


def _instruction(text: str) -> Instruction:
    start = START.match(text)
    assert start is not None
    rest = text[start.end() :]
    if rest.startswith("("):
        depth = 0
        for end, letter in enumerate(rest):  # noqa: B007
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if not depth:
                break
        kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    else:
        kind, _, rest = rest.partition(" ")
    opcode, _, rest = rest.partition("(")
    return Instruction(start[2], opcode.strip(), kind, rest, bool(start[1]))


def _attribute(op: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", op.rest)
    return found[1] if found else ""


def collective_of(op: Instruction, module: Module, axis_sizes: dict[str, int], fused: bool) -> Collective | None:
    """The collective that an instruction is, or starts. A fusion of an all-reduce and the choice of a slice is how the
    TPU compiler writes a reduce-scatter: the all-reduce inside stands for it."""
    asynchronous = op.opcode.endswith("-start")
    op = (module.offloaded(op) if op.opcode == "async-start" else op) or op
    kind = op.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    parts = arrays(op.type)
    if op.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):  # (operands, results[, counters])
        whole = [part for part in parts if part[0] != "u32"]
        parts = whole[len(whole) // 2 :]
    size = sum(bytes_ for _, bytes_ in parts)
    dtype = max(parts, key=lambda part: part[1], default=("", 0))[0]
    members = _members(op.rest, math.prod(axis_sizes.values()))
    if len(set(members)) < 2:
        return None
    if kind == "all-reduce" and fused:
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        size *= len(members)
    count = 2 if kind == "collective-permute" else len(members)
    rings = op.rest.count('"phase_rings"')
    return Collective(kind, _axes(members, axis_sizes), count, dtype, size, asynchronous=asynchronous, rings=rings)


def _members(attributes: str, devices: int) -> list[int]:
    """One group of partitions that exchange with each other: groups are alike but for an offset."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    written = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if written:
        return [int(n) for n in written[1].split(",") if n]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        return _transposed(dims, order)[: int(iota[2])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](.{0,400})", attributes, re.DOTALL)
    if named:
        return _named_members(named[1], named[2])
    return list(range(devices))


def _named_members(mesh: str, after: str) -> list[int]:
    """replica_groups=mesh['a'=2,'b'=32] {'b'}; an axis may be split, 'b':(2)4 is its middle part of 4."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = re.search(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", after)
    group = after[after.index("{") + 1 : after.index("}")]
    total = math.prod(sizes.values())
    number = list(range(total))
    if ids and ids[2]:
        dims = [int(n) for n in ids[2].split(",")]
        number = _transposed(dims, [int(n) for n in ids[3].split(",")] if ids[3] else list(range(len(dims))))
    members = [0]
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", group):
        stride = math.prod(list(sizes.values())[list(sizes).index(name) + 1 :])
        width = int(part) if part else sizes[name]
        stride *= sizes[name] // (int(before) * width) if part else 1
        members = [member + i * stride for member in members for i in range(width)]
    return [number[member] for member in members]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """Elements of arange(dims) in the order that transposing gives."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    found = [0]
    for axis in order:
        found = [base + i * strides[axis] for base in found for i in range(dims[axis])]
    return found


def _axes(members: list[int], axis_sizes: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    differing = []
    stride = math.prod(axis_sizes.values())
    for axis, size in axis_sizes.items():
        stride //= size
        if len({member // stride % size for member in members}) > 1:
            differing.append(axis)
    return tuple(differing)
