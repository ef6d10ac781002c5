"""What a step waits for: the order of instructions that the compiler chose, replayed with the time that each takes.

An exchange that is started early runs beside what stands between its start and the first use of its result, one exchange
at a time on the links. What is left of it then is waited for. An exchange on the sparse cores is prepared by its
`async-start` and sets off with the `async-update` that hands over the operand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from opensora_jax.plan.hlo import Instruction, Module

Seconds = Callable[[Instruction], float]


def waited(module: Module, exchange: Seconds, compute: Seconds) -> float:
    """Seconds of a step in which nothing is computed. exchange: of what an instruction sends or starts to send; compute:
    of what it computes; each 0 where it does none."""
    return _replayed(module, module.entry, exchange, compute).waited


@dataclass
class Clock:
    """Of one computation; exchanges do not outlive it."""

    now: float = 0.0
    waited: float = 0.0
    links_free: float = 0.0
    arrives: dict[str, float] = field(default_factory=dict)  # by the instruction that started it

    def send(self, seconds: float) -> float:
        """When it has arrived; copies and slices within the device, 0 seconds, do not take the links."""
        if not seconds:
            return self.now
        self.links_free = max(self.now, self.links_free) + seconds
        return self.links_free

    def wait_until(self, then: float) -> None:
        self.waited += max(0.0, then - self.now)
        self.now = max(self.now, then)


def _replayed(module: Module, name: str, exchange: Seconds, compute: Seconds) -> Clock:
    clock = Clock()
    started: dict[str, Instruction] = {}  # of an update or a done: what began the exchange
    for op in module.computations.get(name, ()):
        origin = next((started[operand] for operand in op.operands if operand in started), None)
        if op.opcode.endswith("-start"):
            started[op.name] = op
            if op.operands:
                clock.arrives[op.name] = clock.send(exchange(op))
        elif origin is not None and op.opcode.endswith("-update"):
            started[op.name] = origin
            if origin.name not in clock.arrives:
                clock.arrives[origin.name] = clock.send(exchange(origin))
        elif origin is not None and op.opcode.endswith("-done"):
            clock.wait_until(clock.arrives.get(origin.name, 0.0))
        elif op.opcode in ("while", "conditional", "call"):
            inside = [_replayed(module, called, exchange, compute) for called in module.called(op)]
            dearest = max(inside, key=lambda c: c.now, default=Clock())
            times = module.repeats(op)
            clock.now += times * dearest.now
            clock.waited += times * dearest.waited
        else:
            clock.now += compute(op)
            clock.wait_until(clock.send(exchange(op)))
    return clock
