"""Count the bytes that a compiled XLA program moves: from and to device memory, and to other devices.

    traffic = count(compiled.as_text())
    structvit plan --program=PROGRAM.txt

Only the text is read; no device is opened. Programs may be compiled for TPUs (also ahead of time on a machine
without one), CPUs and GPUs. Unlike in XLA's cost analysis,

- the body of a loop counts once per step;
- arrays in vector memory (layouts with S(1)) do not count: a fusion reads its operands in HBM and writes its
  results there, a copy between the two counts at its end in HBM, and a slice counts as a slice;
- a Pallas kernel counts by the blocks that it fetches and stores, not by its cost estimate;
- arrays count with the padding of their tiles, which is transferred too. Scalars count without.

Each operation reads every operand once. That is a lower bound if a convolution or a matrix product fetches
tiles again, and an upper bound for gathers, which count a row for every index.

One device sends in a ring of n devices 2(n-1)/n of the array of an all-reduce, (n-1)/n of the whole array of
an all-gather, reduce-scatter or all-to-all, and all of a collective-permute or a broadcast. Of the branches
of a conditional the one that moves most counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from structvit_jax.performance.traffic import kernels, loops
from structvit_jax.performance.traffic.collectives import COLLECTIVES, sent, sent_within
from structvit_jax.performance.traffic.program import (
    Array,
    Computation,
    Instruction,
    Program,
    leaves,
    parse,
    unwrap_async_start,
)
from structvit_jax.performance.traffic.scopes import op_names, part_of
from structvit_jax.performance.traffic.touched import SOURCES, touched
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
    by_part: dict[str, Moved]  # by phase and name scope, see `names.part_of`; largest first
    guessed: tuple[str, ...] = ()  # name scopes of the loops that were assumed to run `unknown` times

    @property
    def hbm(self) -> float:
        """Read and written."""
        return self.read + self.written


def count(
    text: str, *, trips: Mapping[str, int] | None = None, unknown: int | None = None, depth: int = 1
) -> Traffic:
    """Count the traffic of a compiled program.

    Args:
      text: from `compiled.as_text()`.
      trips: how often loops of unknown length run, by the name of their while instruction (as in an
        optimisation that ends on a tolerance).
      unknown: how often loops run that are of unknown length and not in `trips`; None makes them an error.
      depth: how many name scopes make a part.

    Raises:
      UserError: text that is not a program, a loop of unknown length, or an unknown operation.
    """
    program = parse(text)
    counter = _Counter(program, dict(trips or {}), unknown, depth)
    parts = counter.walk(program.entry, [None] * len(program.entry.parameters), "")
    if strange := counter.trips.keys() - counter.loops:
        raise UserError(f"the program has no loop named {' or '.join(map(repr, sorted(strange)))}")
    largest = sorted(parts.items(), key=lambda item: -(item[1].read + item[1].written))
    totals = _total(parts.values())
    return Traffic(*totals, dict(largest), tuple(sorted(counter.guessed)))


def _total(all_moved: Iterable[Moved]) -> Moved:
    return Moved(*map(sum, zip(Moved(0.0, 0.0, 0.0), *all_moved, strict=True)))


Parts = dict[str, Moved]


def _add(parts: Parts, more: Parts, times: int = 1) -> None:
    for part, moved in more.items():
        moved = Moved(*(times * size for size in moved))
        parts[part] = _total([parts[part], moved]) if part in parts else moved


# These move nothing; their arrays count where they are computed and used.
_FREE = frozenset(
    (*SOURCES, "add-dependency", "bitcast", "domain", "get-tuple-element", "opt-barrier", "tuple")
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")


class _Counter:
    """Walks through the computations in the order of their execution and adds up the traffic."""

    def __init__(self, program: Program, trips: dict[str, int], unknown: int | None, depth: int):
        self.program, self.trips, self.unknown, self.depth = program, trips, unknown, depth
        self.loops: set[str] = set()  # names of all loops
        self.guessed: set[str] = set()  # name scopes of those of unknown length

    def walk(self, computation: Computation, arguments: list, outer: str) -> Parts:
        """Return the traffic of one run of a computation.

        Args:
          arguments: the known integers among its arguments, see `loops.Scalars`.
          outer: name scopes of the caller, for operations without any.
        """
        scalars = loops.Scalars(self.program, computation, arguments)
        names = op_names(self.program, computation, outer)
        parts: Parts = {}
        for op in computation.instructions.values():
            _add(parts, self._run(op, computation, scalars, names[op.name]))
        return parts

    def _run(self, op: Instruction, computation: Computation, scalars: loops.Scalars, name: str) -> Parts:
        kind = op.opcode
        if kind in _FREE or kind.endswith(("-done", "-update")):
            return {}
        if kind == "while":
            return self._loop(op, scalars, name)
        if kind == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [self._call(branch, name) for branch in op.called(*keys)]
            return max(branches, key=lambda parts: sum(_total(parts.values())))
        if kind in ("call", "async-start"):
            return self._call(op.called("to_apply", "calls")[0], name)
        return {part_of(name, self.depth): self._moved(unwrap_async_start(op), computation.sources(op))}

    def _call(self, called: str, name: str, arguments: list | None = None) -> Parts:
        computation = self.program.computations[called]
        return self.walk(computation, arguments or [None] * len(computation.parameters), name)

    def _loop(self, op: Instruction, scalars: loops.Scalars, name: str) -> Parts:
        self.loops.add(op.name)
        count = self.trips.get(op.name)
        count = loops.trips(op, scalars) if count is None else count
        if count is None:
            self.guessed.add(op.op_name or op.name)
            count = self.unknown
        if count is None:
            raise UserError(
                f"unknown how often the loop %{op.name} ({op.op_name or 'no name'}) runs:"
                f" give --trips {op.name}=N, or trips={{{op.name!r}: N}}"
            )
        arguments = loops.invariants(op, scalars)
        parts: Parts = {}
        for key, times in (("body", count), ("condition", count + 1)):
            _add(parts, self._call(op.called(key)[0], name, arguments), times)
        return parts

    def _moved(self, op: Instruction, operands: list[Instruction]) -> Moved:
        """Return the traffic of an instruction that calls no computation of its own."""
        if op.opcode == "custom-call":
            if kernels.TARGET in op.rest:
                return self._kernel(op, operands)
            if any(f'custom_call_target="{target}"' in op.rest for target in _FREE_CALLS):
                return Moved(0.0, 0.0, 0.0)
        away = 0.0
        if op.opcode in COLLECTIVES:
            away = sent(self.program, op, operands)
        elif op.opcode == "fusion":
            fused = self.program.computations[op.called("calls")[0]]
            if any(kernels.TARGET in inner.rest for inner in fused.instructions.values()):
                raise UserError(f"%{op.name} fuses other work into a kernel, which cannot be counted")
            away = sent_within(self.program, fused)
        elif op.opcode == "send":
            away = sum(array.bytes for array in leaves(operands[0].type))
        return Moved(*touched(self.program, op, operands), away)

    def _kernel(self, op: Instruction, operands: list[Instruction]) -> Moved:
        arrays = [array for operand in operands for array in leaves(operand.type)]
        moved = kernels.kernel_traffic(op, arrays)
        results = list(leaves(op.type))
        return Moved(self._in_hbm(moved.read, arrays), self._in_hbm(moved.written, results), moved.sent)

    def _in_hbm(self, sizes: list[float], arrays: list[Array]) -> float:
        return sum(size for size, array in zip(sizes, arrays, strict=True) if self.program.in_hbm(array))


__all__ = ["Moved", "Traffic", "count"]
