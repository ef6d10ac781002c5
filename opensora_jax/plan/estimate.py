"""From what a step holds to what it takes: memory against the chip's, time, MFU. Every figure is an ESTIMATE.

Compute is the compiler's own cycles (its fusions) plus our kernels; communication is bytes over links (links.py). What of
it is waited for, a replay of the compiled program says (replay.py); by formula, asynchronous exchanges hide behind compute
as far as there is any.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from opensora_jax.plan.chips import Topology
from opensora_jax.plan.hlo import Collective
from opensora_jax.plan.links import Links
from opensora_jax.work import Kernel

RESERVE = 0.04  # share of memory kept free: the runtime's own, and fragmentation


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: float
    temporaries: float
    outputs: float = 0.0  # that no argument is overwritten with
    code: float = 0.0

    @property
    def peak(self) -> float:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclass(frozen=True)
class Plan:
    """Of one step on one topology."""

    topology: Topology
    source: str  # "compiler", or "formula": nothing was compiled
    mesh: dict[str, int]
    rules: str
    remat: str
    bucket: str
    batch: int
    tokens: int
    parameters: int
    trainable: int
    memory: Memory
    model_flops: float  # of the whole step, all devices
    hardware_flops: float
    fusion_seconds: float
    fusions_from: str
    kernel_seconds: float
    kernels_from: str
    collectives: tuple[Collective, ...] = ()
    collective_seconds: tuple[float, ...] = ()
    waited_seconds: float | None = None  # for exchanges, by a replay
    kernels: tuple[Kernel, ...] = ()
    kernel_parts: dict[str, tuple[int, float]] = field(default_factory=dict)  # by name: calls, seconds of all of them
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.topology.chip.memory * (1 - RESERVE)

    @property
    def compute_seconds(self) -> float:
        return self.fusion_seconds + self.kernel_seconds

    @property
    def communication_seconds(self) -> float:
        return sum(self.collective_seconds)

    @property
    def exposed_seconds(self) -> float:
        if self.waited_seconds is not None:
            return self.waited_seconds
        pairs = list(zip(self.collectives, self.collective_seconds))
        hidden = sum(seconds for collective, seconds in pairs if collective.asynchronous)
        waited = sum(seconds for collective, seconds in pairs if not collective.asynchronous)
        return waited + max(0.0, hidden - self.compute_seconds)

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def mfu(self) -> float:
        return self._share(self.model_flops)

    @property
    def hfu(self) -> float:
        return self._share(self.hardware_flops)

    def _share(self, flops: float) -> float:
        peak = self.topology.devices * self.topology.chip.flops
        return flops / self.step_seconds / peak if self.step_seconds else 0.0

    def advice(self) -> list[str]:
        """What to change, dearest cause first; empty where there is nothing to say."""
        said = []
        chip, memory, mesh = self.topology.chip, self.memory, self.mesh
        if not self.fits:
            over = memory.peak - chip.memory * (1 - RESERVE)
            said.append(f"does not fit by {gigabytes(over)}")
            if memory.temporaries > memory.arguments:
                if self.remat == "none":
                    said.append("keep less: --config.model.remat=full")
                said.append("cut the video: a larger context axis with --config.mesh.rules=fsdp_context")
                if self.batch > mesh.get("data", 1) * mesh.get("fsdp", 1):
                    said.append("fewer clips a group, or --config.optimizer.accumulate_steps=2")
            else:
                said.append("cut the state: a larger fsdp axis, with rules that cut parameters (fsdp, fsdp_context)")
            said.append("or more chips; --search tries meshes, remat and micro-batches")
        if self.exposed_seconds > self.compute_seconds > 0:
            said.append("communication takes longer than compute: a smaller context axis, or more clips a group")
        return said

    def summary(self) -> dict:
        """Plain numbers for --json."""
        exchanges = [
            asdict(collective) | {"moved": collective.moved, "seconds": seconds}
            for collective, seconds in zip(self.collectives, self.collective_seconds)
        ]
        kernels = [{"name": k.name, "calls": k.calls, "flops": k.flops, "bytes": k.bytes} for k in self.kernels]
        return {
            "estimate": True, "source": self.source, "topology": self.topology.name, "chips": self.topology.chips,
            "devices": self.topology.devices, "mesh": self.mesh, "rules": self.rules, "remat": self.remat,
            "bucket": self.bucket, "batch": self.batch, "tokens": self.tokens,
            "parameters": self.parameters, "trainable": self.trainable,
            "memory": asdict(self.memory) | {"peak": self.memory.peak, "capacity": self.topology.chip.memory},
            "fits": self.fits, "model_flops": self.model_flops, "hardware_flops": self.hardware_flops,
            "seconds": {
                "fusions": self.fusion_seconds, "kernels": self.kernel_seconds, "compute": self.compute_seconds,
                "communication": self.communication_seconds, "exposed": self.exposed_seconds,
                "step": self.step_seconds,
            },
            "fusions_from": self.fusions_from, "kernels_from": self.kernels_from,
            "kernel_parts": {name: {"calls": n, "seconds": seconds} for name, (n, seconds) in self.kernel_parts.items()},
            "mfu": self.mfu, "hfu": self.hfu, "collectives": exchanges, "kernels": kernels,
            "compile_seconds": self.compile_seconds, "advice": self.advice(), "notes": list(self.notes),
        }  # fmt: skip


def timed(collectives: tuple[Collective, ...], links: Links) -> tuple[float, ...]:
    return tuple(links.seconds(collective) for collective in collectives)


def call_seconds(kernels: list[Kernel], topology: Topology) -> Callable[[str], float]:
    """Of one call of the kernel that an instruction's name holds, at the chip's peak or its memory's speed, whichever is
    slower; the mean where kernels of one name differ."""
    chip, totals = topology.chip, defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        total = totals[kernel.name]
        total[0] += kernel.calls * max(kernel.flops / chip.flops, kernel.bytes / chip.bandwidth)
        total[1] += kernel.calls

    def seconds(instruction: str) -> float:
        name = max((name for name in totals if name in instruction), key=len)
        return totals[name][0] / totals[name][1]

    return seconds


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
