"""Trip counts of while loops, from the text of the program."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from structvit_jax.performance.traffic.program import Array, Computation, Instruction, Program

_MAX_STEPS = 10**6  # followed at most

_COMPARE = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}


def quotient(a: int, b: int) -> int:
    """Return a / b, truncated; -1 if b is 0, as in XLA."""
    if not b:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_ARITHMETIC: dict[str, Callable] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "negate": operator.neg,
    "divide": quotient,
    "remainder": lambda a, b: a - b * quotient(a, b),
    "clamp": lambda low, x, high: min(max(low, x), high),
    "select": lambda which, a, b: a if which else b,
}
_SAME = ("copy", "bitcast", "reshape", "convert", "broadcast", "opt-barrier")


class Scalars:
    """Integers of a computation that are known without running it.

    A value is an int, a list of values for a tuple, or None if it is unknown.
    """

    def __init__(self, program: Program, computation: Computation, arguments: Sequence[Any]):
        self.program, self.computation, self.arguments = program, computation, arguments
        self.known: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        if name not in self.known:
            self.known[name] = self._value(self.computation.instructions[name])
        return self.known[name]

    def _value(self, op: Instruction) -> Any:
        kind = op.opcode
        if kind == "parameter":
            return self.arguments[int(op.arguments)]
        if kind == "tuple":
            return [self.value(name) for name in op.operands]
        if kind == "get-tuple-element":
            whole = self.value(op.operands[0])
            return whole[int(op.attribute("index"))] if whole else None
        if isinstance(op.type, Array) and (op.type.elements != 1 or op.type.dtype[0] not in "sup"):
            return None
        if kind in ("fusion", "call"):
            inner = self.program.computations[op.called("calls", "to_apply")[0]]
            return Scalars(self.program, inner, self._values(op)).value(inner.root)
        if not isinstance(op.type, Array):
            return None
        if kind == "constant":
            text = op.arguments.strip("{} ")
            return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
        if kind in _SAME and op.type.dtype != "pred":
            return self.value(op.operands[0])
        work = _COMPARE[op.attribute("direction")] if kind == "compare" else _ARITHMETIC.get(kind)
        values = self._values(op) if work else [None]
        return None if work is None or None in values else int(work(*values))

    def _values(self, op: Instruction) -> list:
        return [self.value(name) for name in op.operands]


def trips(loop: Instruction, scalars: Scalars) -> int | None:
    """Return how often the body of a while loop runs; None if it is unknown.

    XLA annotates some loops (not on TPUs). For others the integers of the loop are evaluated step by step
    until the condition is false, which also covers loops that XLA peeled, unrolled or pipelined. The last
    resort is a name scope directly around the loop, such as "times8".

    Args:
      loop: the while instruction.
      scalars: of the computation that contains it.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(match[1])
    program = scalars.program
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    state = scalars.value(loop.operands[0])
    for count in range(_MAX_STEPS):
        check = Scalars(program, program.computations[condition], [state])
        goes_on = check.value(check.computation.root)
        if goes_on is None:
            break
        if not goes_on:
            return count
        step = Scalars(program, program.computations[body], [state])
        state = step.value(step.computation.root)
    named = re.search(r"times(\d+)\)*/(?:[\w()]+/)?while$", loop.op_name)
    return int(named[1]) if named else None


def invariants(loop: Instruction, scalars: Scalars) -> list:
    """Return the arguments of the body: the initial values that no step changes, None for the others."""
    state = scalars.value(loop.operands[0])
    body = scalars.program.computations[loop.called("body")[0]]
    root = body.instructions[body.root]
    if not isinstance(state, list) or root.opcode != "tuple":
        return [None]
    argument = body.parameters[0].name
    same = [
        op.opcode == "get-tuple-element"
        and op.operands[0] == argument
        and op.attribute("index") == str(index)
        for index, op in enumerate(body.sources(root))
    ]
    return [[value if unchanged else None for value, unchanged in zip(state, same, strict=True)]]
