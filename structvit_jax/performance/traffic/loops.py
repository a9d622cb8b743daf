"""Find the trip counts of while loops, by evaluating the integers in the text of a program."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from structvit_jax.performance.traffic.program import Array, Computation, Instruction, Program

_MAX_STEPS = 10**6  # longest loop that is evaluated step by step


def _divide(a: int, b: int) -> int:
    """Return a / b, rounded towards zero; -1 if b is 0, as in XLA."""
    if not b:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


COMPARISONS: dict[str, Callable[..., bool]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "negate": operator.neg,
    "divide": _divide,
    "remainder": lambda a, b: a - b * _divide(a, b),
    "clamp": lambda low, x, high: min(max(low, x), high),
    "select": lambda condition, a, b: a if condition else b,
}
_SAME_VALUE = ("copy", "bitcast", "reshape", "convert", "broadcast", "opt-barrier")


class Scalars:
    """The integers of a computation that are known without running the program.

    A value is an int, a list of values (for a tuple), or None if it is unknown.
    """

    def __init__(self, program: Program, computation: Computation, arguments: Sequence[Any]):
        self.program, self.computation, self.arguments = program, computation, arguments
        self._known: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        """Return the value of an instruction."""
        if name not in self._known:
            self._known[name] = self._evaluate(self.computation.instructions[name])
        return self._known[name]

    def _evaluate(self, op: Instruction) -> Any:
        opcode = op.opcode
        if opcode == "parameter":
            return self.arguments[int(op.arguments)]
        if opcode == "tuple":
            return self._operands(op)
        if opcode == "get-tuple-element":
            elements = self.value(op.operands[0])
            return elements[int(op.attribute("index"))] if elements else None
        if isinstance(op.type, Array) and (op.type.elements != 1 or op.type.dtype[0] not in "sup"):
            return None  # not an integer (s32, u32, pred)
        if opcode in ("fusion", "call"):
            return root_value(self.program, op.called("calls", "to_apply")[0], self._operands(op))
        if not isinstance(op.type, Array):
            return None
        if opcode == "constant":
            text = op.arguments.strip("{} ")
            return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
        if opcode in _SAME_VALUE and op.type.dtype != "pred":
            return self.value(op.operands[0])
        function: Callable[..., int] | None = ARITHMETIC.get(opcode)
        if opcode == "compare":
            function = COMPARISONS[op.attribute("direction")]
        operands = self._operands(op) if function else [None]
        return None if function is None or None in operands else int(function(*operands))

    def _operands(self, op: Instruction) -> list[Any]:
        return [self.value(name) for name in op.operands]


def root_value(program: Program, name: str, arguments: Sequence[Any]) -> Any:
    """Return the result of a computation as far as it is known, see `Scalars`."""
    computation = program.computations[name]
    return Scalars(program, computation, arguments).value(computation.root)


def trip_count(loop: Instruction, scalars: Scalars) -> int | None:
    """Return how often the body of a while loop runs; None if this is unknown.

    Three ways are tried:

    1. XLA annotates some loops with their trip count, but none in programs for TPUs.
    2. The integers of the loop are evaluated step by step until the condition is false. This also works for
       loops that XLA peeled, unrolled or pipelined.
    3. A name scope directly around the loop, such as "times8", states the trip count.

    Args:
      loop: the while instruction.
      scalars: known integers of the computation that contains the loop.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(match[1])
    condition, body = loop.called("condition", "body")
    state = scalars.value(loop.operands[0])
    for count in range(_MAX_STEPS):
        continues = root_value(scalars.program, condition, [state])
        if continues is None:
            break
        if not continues:
            return count
        state = root_value(scalars.program, body, [state])
    named = re.search(r"times(\d+)\)*/(?:[\w()]+/)?while$", loop.op_name)
    return int(named[1]) if named else None


def invariants(loop: Instruction, scalars: Scalars) -> list[Any]:
    """Return the arguments of the body: the initial values that no step changes, and None for all others."""
    state = scalars.value(loop.operands[0])
    body = scalars.program.computations[loop.called("body")[0]]
    root = body.instructions[body.root]
    if not isinstance(state, list) or root.opcode != "tuple":
        return [None]
    argument = body.parameters[0].name
    unchanged = [
        op.opcode == "get-tuple-element"
        and op.operands[0] == argument
        and op.attribute("index") == str(index)
        for index, op in enumerate(body.sources(root))
    ]
    return [[value if same else None for value, same in zip(state, unchanged, strict=True)]]
