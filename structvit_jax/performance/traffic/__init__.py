"""The bytes that a compiled XLA program moves: to and from the device's memory, and to other devices.

    traffic = count(compiled.as_text())
    structvit plan --program=PROGRAM.txt

The text is all that is read; no device is opened. It suits programs compiled for TPUs, also ahead of time
on a machine without one, and programs for CPUs and GPUs. Unlike XLA's own cost analysis,

- a loop's body counts as often as it runs;
- what stays in vector memory (layouts with S(1)) is left out: a fusion reads its operands in HBM and writes
  its results there, a copy between the two counts at its end in HBM, and a slice counts as a slice;
- a Pallas kernel counts by the blocks that it fetches and stores, not by the cost that it declares;
- arrays count with the padding of their tiles, which the bus carries too. Scalars count their own size.

Every operand is read once by each operation. That is a lower bound where a convolution or a matrix product
fetches tiles again, and an upper one for gathers, which count a row for every index.

Bytes sent are those that one device sends, by the rule of a ring of n devices: 2(n-1)/n of an all-reduce's
array, (n-1)/n of the whole array of an all-gather, reduce-scatter or all-to-all, all of a
collective-permute or a broadcast. Of a conditional's branches the one that moves most counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from structvit_jax.performance.traffic import kernels, loops
from structvit_jax.performance.traffic.collectives import COLLECTIVES, sent, sent_within
from structvit_jax.performance.traffic.names import op_names, part_of
from structvit_jax.performance.traffic.program import (
    Array,
    Computation,
    Instruction,
    Program,
    begun,
    leaves,
    parse,
)
from structvit_jax.performance.traffic.touched import SOURCES, touched
from structvit_jax.utils.errors import UserError


class Moved(NamedTuple):
    """Bytes on one device."""

    read: float  # from HBM
    written: float  # to HBM
    sent: float  # to other devices


class Traffic(NamedTuple):
    """What one run of a program moves on one device, in bytes."""

    read: float  # from HBM
    written: float  # to HBM
    sent: float  # to other devices
    by_part: dict[str, Moved]  # by phase and name scope, see `names.part_of`; the largest first
    guessed: tuple[str, ...] = ()  # names of the loops for which `unknown` was taken

    @property
    def hbm(self) -> float:
        """Read and written."""
        return self.read + self.written


def count(
    text: str, *, trips: Mapping[str, int] | None = None, unknown: int | None = None, depth: int = 1
) -> Traffic:
    """Counts a compiled program.

    Args:
      text: what `compiled.as_text()` returns.
      trips: how often loops run, by the name of their while instruction; for those where the text does
        not say (an optimisation that ends on a tolerance, say).
      unknown: how often such loops run that `trips` does not name; without it they are an error.
      depth: how many name scopes make a part.

    Raises:
      UserError: text that is no such program, a loop without a count, or an operation that is not known.
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

# Nothing moves in these; what they name is counted where it is made and used.
_FREE = frozenset(
    (*SOURCES, "add-dependency", "bitcast", "domain", "get-tuple-element", "opt-barrier", "tuple")
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")


class _Counter:
    """Walks the computations that are run one by one, and adds up what their instructions move."""

    def __init__(self, program: Program, trips: dict[str, int], unknown: int | None, depth: int):
        self.program, self.trips, self.unknown, self.depth = program, trips, unknown, depth
        self.loops: set[str] = set()  # those met
        self.guessed: set[str] = set()  # names of those of unknown length

    def walk(self, computation: Computation, arguments: list, outer: str) -> Parts:
        """What one run of a computation moves.

        Args:
          arguments: the integers among its arguments that are known, see `loops.Scalars`.
          outer: the name of what runs it, for operations without one.
        """
        scalars = loops.Scalars(self.program, computation, arguments)
        names = op_names(self.program, computation, outer)
        parts: Parts = {}
        for op in computation.instructions.values():
            for part, moved in self._run(op, computation, scalars, names[op.name]).items():
                parts[part] = _total([parts[part], moved]) if part in parts else moved
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
        return {part_of(name, self.depth): self._moved(begun(op), computation.sources(op))}

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
                f"the text does not say how often the loop %{op.name} ({op.op_name or 'no name'}) runs:"
                f" give --trips {op.name}=N, or trips={{{op.name!r}: N}}"
            )
        arguments = loops.kept(op, scalars)
        parts: Parts = {}
        for key, times in (("body", count), ("condition", count + 1)):
            for part, moved in self._call(op.called(key)[0], name, arguments).items():
                more = Moved(*(times * size for size in moved))
                parts[part] = _total([parts[part], more]) if part in parts else more
        return parts

    def _moved(self, op: Instruction, operands: list[Instruction]) -> Moved:
        """What an instruction moves that runs no other."""
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
