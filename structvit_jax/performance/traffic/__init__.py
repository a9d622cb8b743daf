"""Count the bytes that a compiled XLA program moves: from and to device memory, and to other devices.

    traffic = count(compiled.as_text())
    structvit plan --program=PROGRAM.txt

Only the text is read; no device is opened. Programs may be compiled for TPUs (also ahead of time, on a
machine without one), CPUs and GPUs. Unlike in XLA's cost analysis,

- the body of a loop counts once per step;
- arrays in vector memory (layouts with S(1)) do not count: a fusion reads its operands in HBM and writes its
  results there, a copy between the two counts at its end in HBM, and a slice counts as a slice;
- a Pallas kernel counts by the blocks that it fetches and stores, not by its cost estimate;
- arrays count with the padding of their tiles, which is transferred too. Scalars are not padded.

Each operation reads every operand once. That is a lower bound if a convolution or a matrix product fetches
tiles again, and an upper bound for gathers, which count a row for every index.

In a ring of n devices each sends 2(n-1)/n of the array of an all-reduce, (n-1)/n of the whole array of an
all-gather, reduce-scatter or all-to-all, and all of a collective-permute or a broadcast. Of the branches of a
conditional, the one that moves most counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from structvit_jax.performance.traffic import kernels
from structvit_jax.performance.traffic.loops import Scalars, invariants, trip_count
from structvit_jax.performance.traffic.operations import SOURCES, bytes_sent, hbm_traffic
from structvit_jax.performance.traffic.program import (
    Computation,
    Instruction,
    Program,
    leaves,
    op_names,
    parse,
    part_of,
    unwrap_async_start,
)
from structvit_jax.utils.errors import UserError


class Moved(NamedTuple):
    """Bytes on one device."""

    read: float  # from HBM
    written: float  # to HBM
    sent: float  # to other devices


class Traffic(NamedTuple):
    """Bytes that one run of a program moves on one device."""

    read: float  # from HBM
    written: float  # to HBM
    sent: float  # to other devices
    by_part: dict[str, Moved]  # by phase and name scopes, see `program.part_of`; the largest first
    unknown_loops: tuple[str, ...]  # name scopes of loops of unknown length, which count as one step

    @property
    def hbm(self) -> float:
        """Bytes read from and written to HBM."""
        return self.read + self.written


def count(text: str, *, depth: int = 1) -> Traffic:
    """Count the traffic of a compiled program.

    Loops of unknown length, such as optimisations that end at a tolerance, count as one step and are listed.
    The name scope "timesN" directly around a loop states that it has N steps.

    Args:
      text: the program, from `compiled.as_text()`.
      depth: how many name scopes make a part.

    Raises:
      UserError: text that is not a program.
    """
    program = parse(text)
    counter = _Counter(program, depth)
    parts = counter.count(program.entry, [None] * len(program.entry.parameters), "")
    by_part = {name: Moved(*map(float, moved)) for name, moved in parts.items()}
    largest_first = sorted(by_part.items(), key=lambda item: -(item[1].read + item[1].written))
    read, written, sent = map(float, _total(parts))
    return Traffic(read, written, sent, dict(largest_first), tuple(sorted(counter.unknown_loops)))


_Parts = dict[str, np.ndarray]  # bytes [read, written, sent] of each part


def _total(parts: _Parts) -> np.ndarray:
    return sum(parts.values(), np.zeros(3))


def _add(parts: _Parts, more: _Parts, times: int = 1) -> None:
    for name, moved in more.items():
        parts[name] = parts.get(name, 0) + times * moved


# These operations move nothing; their arrays count where they are computed and used.
_FREE = frozenset(
    (*SOURCES, "add-dependency", "bitcast", "domain", "get-tuple-element", "opt-barrier", "tuple")
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")


class _Counter:
    """Follows the computations of a program in the order of their execution."""

    def __init__(self, program: Program, depth: int):
        self.program, self.depth = program, depth
        self.unknown_loops: set[str] = set()

    def count(self, computation: Computation, arguments: Sequence[Any], outer: str) -> _Parts:
        """Return the traffic of one run of a computation.

        Args:
          arguments: known integers among its arguments, see `loops.Scalars`.
          outer: name scopes of the caller, for operations that have none.
        """
        scalars = Scalars(self.program, computation, arguments)
        names = op_names(self.program, computation, outer)
        parts: _Parts = {}
        for op in computation.instructions.values():
            _add(parts, self._count_operation(op, computation, scalars, names[op.name]))
        return parts

    def _count_operation(
        self, op: Instruction, computation: Computation, scalars: Scalars, name: str
    ) -> _Parts:
        if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
            return {}
        if op.opcode == "while":
            return self._count_loop(op, scalars, name)
        if op.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [self._count_call(branch, name) for branch in op.called(*keys)]
            return max(branches, key=lambda parts: _total(parts).sum())
        if op.opcode in ("call", "async-start"):
            return self._count_call(op.called("to_apply", "calls")[0], name)
        return {part_of(name, self.depth): self._moved(unwrap_async_start(op), computation.sources(op))}

    def _count_call(self, called: str, name: str, arguments: Sequence[Any] | None = None) -> _Parts:
        computation = self.program.computations[called]
        return self.count(computation, arguments or [None] * len(computation.parameters), name)

    def _count_loop(self, op: Instruction, scalars: Scalars, name: str) -> _Parts:
        trips = trip_count(op, scalars)
        if trips is None:
            self.unknown_loops.add(op.op_name or op.name)
            trips = 1
        arguments = invariants(op, scalars)
        parts: _Parts = {}
        for key, times in (("body", trips), ("condition", trips + 1)):
            _add(parts, self._count_call(op.called(key)[0], name, arguments), times)
        return parts

    def _moved(self, op: Instruction, operands: Sequence[Instruction]) -> np.ndarray:
        """Return the bytes [read, written, sent] of an operation other than a loop or a call."""
        if op.opcode == "custom-call":
            if kernels.TARGET in op.rest:
                return self._count_kernel(op, operands)
            if any(f'custom_call_target="{target}"' in op.rest for target in _FREE_CALLS):
                return np.zeros(3)
        if op.opcode == "fusion":
            fused = self.program.computations[op.called("calls")[0]]
            if any(kernels.TARGET in inner.rest for inner in fused.instructions.values()):
                raise UserError(f"%{op.name} fuses other work into a kernel, which cannot be counted")
        sent = bytes_sent(self.program, op, operands)
        return np.array([*hbm_traffic(self.program, op, operands), sent], float)

    def _count_kernel(self, op: Instruction, operands: Sequence[Instruction]) -> np.ndarray:
        inputs = [array for operand in operands for array in leaves(operand.type)]
        arrays = [*inputs, *leaves(op.type)]
        sizes = [
            size if self.program.in_hbm(array) else 0.0
            for array, size in zip(arrays, kernels.kernel_traffic(op, arrays), strict=True)
        ]
        return np.array([sum(sizes[: len(inputs)]), sum(sizes[len(inputs) :]), 0.0])


__all__ = ["Moved", "Traffic", "count"]
