"""Count the bytes that a compiled XLA program moves: from and to device memory, and to other devices.

    traffic = count(compiled.as_text())
    structvit plan --program=PROGRAM.txt

Only the text of the program is read; no device is opened. The program may be compiled for CPUs, GPUs or TPUs,
also ahead of time on a machine without them. The count differs from XLA's cost analysis:

- The body of a loop is counted once per step.
- Only arrays in HBM are counted, not those in the vector memory of a TPU (layouts with S(1)). A copy between
  the two memories is counted once, as a read or as a write of HBM.
- An operation that reads a slice of an array is counted with the bytes of the slice.
- A Pallas kernel is counted by the blocks that it fetches and stores, not by its cost estimate.
- Arrays are counted with the padding of their tiles, which is transferred too. Scalars are not padded.

Each operation is assumed to read every operand once. This is a lower bound if a convolution or a matrix
product fetches tiles repeatedly. It is an upper bound for gathers, where every index is assumed to read its
own row.

Collectives are assumed to run in a ring. Of n devices, each sends

- 2(n-1)/n of the array in an all-reduce;
- (n-1)/n of the whole array in an all-gather, a reduce-scatter or an all-to-all;
- the whole array in a collective-permute or a broadcast.

Of the branches of a conditional, only the one that moves the most bytes is counted.
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
    """Bytes that one device moves."""

    read: float  # from HBM
    written: float  # to HBM
    sent: float  # to other devices


class Traffic(NamedTuple):
    """Bytes that one run of a program moves on one device."""

    read: float  # from HBM
    written: float  # to HBM
    sent: float  # to other devices
    by_part: dict[str, Moved]  # by name of the part, see `program.part_of`; parts with most bytes first
    unknown_loops: tuple[str, ...]  # name scopes of loops of unknown length, counted as one step

    @property
    def hbm(self) -> float:
        """Bytes read from and written to HBM."""
        return self.read + self.written


def count(text: str, *, depth: int = 1) -> Traffic:
    """Count the traffic of a compiled program.

    A loop of unknown length, such as one that ends when a tolerance is reached, is counted as one step and
    listed in `Traffic.unknown_loops`. To state that a loop has N steps, put the name scope "timesN" directly
    around it.

    Args:
      text: the program, from `compiled.as_text()`.
      depth: number of name scopes in the name of a part.

    Raises:
      UserError: the text is not a compiled program, or cannot be counted.
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


# These operations move no bytes. Their arrays are counted by the operations that compute and use them.
_FREE = frozenset(
    (*SOURCES, "add-dependency", "bitcast", "domain", "get-tuple-element", "opt-barrier", "tuple")
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # targets of custom calls that move no bytes


class _Counter:
    """Counts a program, following its computations in the order in which they run."""

    def __init__(self, program: Program, depth: int):
        self.program, self.depth = program, depth
        self.unknown_loops: set[str] = set()

    def count(self, computation: Computation, arguments: Sequence[Any], outer: str) -> _Parts:
        """Return the traffic of one run of a computation.

        Args:
          arguments: values of its arguments as far as they are known, see `loops.Scalars`.
          outer: name scopes of the caller, used for operations without name scopes.
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
                raise UserError(f"cannot count %{op.name}: it fuses a Pallas kernel with other operations")
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
