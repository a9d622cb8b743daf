"""Bytes that an operation reads and writes: a fusion may touch only a slice of a stacked array.

A demand lists the elements of an array that are needed: regions and their numbers of elements. Demands are
propagated from the results of a fused computation back to its parameters. Equal slices are one region, so a
slice with two users is read once; different regions of one array add up, at most to the whole array.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from structvit_jax.performance.traffic.collectives import COLLECTIVES, asynchronous
from structvit_jax.performance.traffic.program import (
    Array,
    Computation,
    Instruction,
    Program,
    leaves,
    opcodes,
)
from structvit_jax.utils.errors import UserError

Demand = dict[Any, float]  # region -> elements
WHOLE: Demand = {None: math.inf}

# An element of the result depends on one element of each operand.
ELEMENTWISE = opcodes(
    "abs acos acosh add and asin asinh atan atan2 atanh bitcast bitcast-convert cbrt ceil clamp compare"
    " complex convert copy cosh cosine count-leading-zeros divide erf exponential exponential-minus-one"
    " floor imag is-finite log log-plus-one logistic map maximum minimum multiply negate not opt-barrier"
    " or popcnt power real reduce-precision remainder reshape reverse round-nearest-afz round-nearest-even"
    " rsqrt select shift-left shift-right-arithmetic shift-right-logical sign sine sinh sqrt stochastic-"
    " convert subtract tan tanh transpose tuple get-tuple-element xor"
)
# An element of the result may depend on all elements of every operand.
MIXING = opcodes(
    "batch-norm-grad batch-norm-inference batch-norm-training broadcast cholesky concatenate convolution"
    " custom-call dot fft get-dimension-size pad ragged-dot reduce reduce-window rng rng-bit-generator"
    " rng-get-and-update-state scaled-dot select-and-scatter set-dimension-size sort topk triangular-solve"
    " infeed iota outfeed recv send"
)
SLICING = ("slice", "dynamic-slice", "gather")
UPDATING = ("dynamic-update-slice", "scatter")
SOURCES = ("parameter", "constant", "partition-id", "replica-id", "after-all")


def touched(program: Program, op: Instruction, operands: Sequence[Instruction]) -> tuple[float, float]:
    """Return the bytes that an operation reads from HBM and writes to it.

    Each operand is read once: the text does not state how often a convolution fetches a tile again.

    Raises:
      UserError: an operation that is not known.
    """
    results = list(leaves(op.type))
    names = [f"%{operand.name}" for operand in operands]
    if op.opcode == "fusion":
        fused = program.computations[op.called("calls")[0]]
        made = _made(fused, len(results))
        updates = [_updates(program, fused, *pair) for pair in zip(made, results, strict=True)]
        sizes = [_size(fused, updated) for updated in updates]
        wanted = [WHOLE] * len(results)
        if any(map(asynchronous, fused.instructions.values())):
            for index in _aliased(op):  # buffers that a collective passes on until it is done
                sizes[index], wanted[index] = 0.0, {}
        in_place = {update.name for updated in updates for update in updated}
        wants = _demands(program, fused, zip(made, wanted, strict=True), in_place, names)
    else:
        is_update = op.opcode in UPDATING and _same_space(operands[0], results[0])
        sizes = [_update_elements(op, operands)] if is_update else [None] * len(results)
        wants = _passed_on(op, WHOLE, operands, is_update, names)
    read = sum(
        array.part(sum(want.values()))
        for operand, want in zip(operands, wants, strict=True)
        for array in leaves(operand.type)
        if program.in_hbm(array)
    )
    written = sum(
        result.bytes if size is None else result.part(size)
        for result, size in zip(results, sizes, strict=True)
        if program.in_hbm(result)
    )
    return read, written


def _aliased(op: Instruction) -> set[int]:
    """Return the indices of results that share a buffer with an operand."""
    pairs = op.attribute("output_to_operand_aliasing")
    return {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(", pairs)}


def _made(fused: Computation, results: int) -> list[Instruction]:
    """Return the instructions that compute the results of a fusion; one may compute several."""
    root = fused.instructions[fused.root]
    if root.opcode != "tuple":
        return [root] * results
    return [source for source in fused.sources(root) for _ in leaves(source.type)]


def _same_space(op: Instruction, result: Array) -> bool:
    return next(leaves(op.type)).space == result.space


def _origin(program: Program, fused: Computation, op: Instruction) -> Instruction:
    """Return the instruction whose bytes `op` yields through bitcasts."""
    while op.opcode == "bitcast" or (op.opcode == "fusion" and _only_bitcasts(program, op)):
        op = fused.sources(op)[0]
    return op


def _only_bitcasts(program: Program, op: Instruction) -> bool:
    inner = program.computations[op.called("calls")[0]].instructions.values()
    return len(op.operands) == 1 and all(x.opcode in ("parameter", "bitcast") for x in inner)


def _updates(program: Program, fused: Computation, op: Instruction, result: Array) -> list[Instruction]:
    """Return the updates in place that compute a result from a parameter, whose buffer it shares."""
    found = []
    while (op := _origin(program, fused, op)).opcode in UPDATING:
        found.append(op)
        op = fused.sources(op)[0]
    return found if op.opcode == "parameter" and _same_space(op, result) else []


def _size(fused: Computation, updates: list[Instruction]) -> float | None:
    """Return the number of elements that updates write; None is the whole result."""
    return sum(_update_elements(op, fused.sources(op)) for op in updates) if updates else None


def _update_elements(op: Instruction, operands: Sequence[Instruction]) -> float:
    """Return the number of elements that a dynamic-update-slice or a scatter writes."""
    position = 1 if op.opcode == "dynamic-update-slice" else (len(operands) - 1) // 2 + 1
    return next(leaves(operands[position].type)).elements


def _demands(
    program: Program,
    fused: Computation,
    wanted: Iterable[tuple[Instruction, Demand]],
    in_place: Collection[str],
    names: Sequence[str],
) -> list[Demand]:
    """Return the demands of a fused computation on its parameters.

    Args:
      wanted: the instructions that compute its results, and the demands on them.
      in_place: names of the updates that write to the buffer of a parameter.
      names: of the operands; they identify the regions of slices.
    """
    wants: dict[str, list[Demand]] = {name: [] for name in fused.instructions}
    for op, want in wanted:
        wants[op.name].append(want)
    named = {op.name: names[int(op.arguments)] for op in fused.parameters}

    def name_of(op: Instruction) -> str:
        op = _origin(program, fused, op)
        if op.opcode == "constant":
            return op.arguments
        return named.get(op.name) or f"{fused.name}({','.join(names)})%{op.name}"

    for op in reversed(fused.instructions.values()):
        want = {region: size for part in wants[op.name] for region, size in part.items()}
        if not want or op.opcode in SOURCES:
            continue
        sources = fused.sources(op)
        labels = [name_of(x) for x in sources]
        if op.opcode == "fusion":
            inner = program.computations[op.called("calls")[0]]
            made = _made(inner, 1)
            parts = _demands(program, inner, [(part, want) for part in made], (), labels)
        else:
            parts = _passed_on(op, want, sources, op.name in in_place, labels)
        for source, part in zip(sources, parts, strict=True):
            wants[source.name].append(part)
    return [
        {region: size for part in wants[op.name] for region, size in part.items()} for op in fused.parameters
    ]


def _passed_on(
    op: Instruction, want: Demand, operands: Sequence[Instruction], in_place: bool, names: Sequence[str]
) -> list[Demand]:
    """Return the demands of an operation on its operands, given the demand on its result."""
    kind, result = op.opcode, next(leaves(op.type))
    size = result.elements
    if kind in SLICING:
        at = (kind, *names[1:], op.attribute("slice"), op.attribute("dynamic_slice_sizes"), result.dims)
        sliced = {(at, region): min(elements, size) for region, elements in want.items()}
        return [sliced] + [WHOLE] * (len(operands) - 1)
    if kind in UPDATING:
        if not in_place:
            return [want] + [WHOLE] * (len(operands) - 1)
        # A scatter may read the old elements, a dynamic-update-slice overwrites them.
        count = (len(operands) - 1) // 2 if kind == "scatter" else 1
        old = {op.name: _update_elements(op, operands)} if kind == "scatter" else {}
        return [old] * count + [WHOLE] * (len(operands) - count)
    if kind in ("bitcast", "bitcast-convert"):  # may change the size of elements
        ratio = next(leaves(operands[0].type)).elements / max(size, 1)
        return [{region: elements * ratio for region, elements in want.items()}]
    if kind in ELEMENTWISE:
        return [want] * len(operands)
    if kind in MIXING or kind in COLLECTIVES:
        return [WHOLE] * len(operands)
    raise UserError(f"%{op.name} is a {kind!r}, an operation unknown to the traffic counter")
