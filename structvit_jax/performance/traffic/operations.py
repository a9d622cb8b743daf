"""Count the bytes that one operation reads from HBM, writes to HBM and sends to other devices.

A fusion may read only a slice of an array. Therefore each array has a demand: the regions of the array that
are needed, and the number of elements in each. Demands are propagated from the results of a fused computation
back to its parameters. Equal slices are one region, so a slice with two users is read once. The elements of
different regions are added, up to the size of the array.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from structvit_jax.performance.traffic.program import Array, Computation, Instruction, Program, leaves
from structvit_jax.utils.errors import UserError

Demand = dict[Any, float]  # number of elements, by region
_WHOLE: Demand = {None: math.inf}  # demand of a whole array

_COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
SOURCES = ("parameter", "constant", "partition-id", "replica-id", "after-all")
_SLICING = ("slice", "dynamic-slice", "gather")
_UPDATING = ("dynamic-update-slice", "scatter")
# In these operations, an element of the result depends on one element of each operand. All other operations
# are assumed to need every operand as a whole.
_ELEMENTWISE = """
    abs acos acosh add and asin asinh atan atan2 atanh bitcast bitcast-convert cbrt ceil clamp compare complex
    convert copy cosh cosine count-leading-zeros divide erf exponential exponential-minus-one floor
    get-tuple-element imag is-finite log log-plus-one logistic map maximum minimum multiply negate not
    opt-barrier or popcnt power real reduce-precision remainder reshape reverse round-nearest-afz
    round-nearest-even rsqrt select shift-left shift-right-arithmetic shift-right-logical sign sine sinh sqrt
    stochastic-convert subtract tan tanh transpose tuple xor
"""
_ELEMENTWISE_OPCODES = frozenset(_ELEMENTWISE.split())


def hbm_traffic(program: Program, op: Instruction, operands: Sequence[Instruction]) -> tuple[float, float]:
    """Return the bytes that an operation reads from HBM, and the bytes that it writes to HBM.

    Each operand is assumed to be read once: the text does not state how often a convolution fetches a tile.
    """
    results = list(leaves(op.type))
    names = [f"%{operand.name}" for operand in operands]
    if op.opcode == "fusion":
        fused = program.computations[op.called("calls")[0]]
        producers = _producers(fused, len(results))
        updates = [_updates(program, fused, *pair) for pair in zip(producers, results, strict=True)]
        written = [_chain_elements(fused, chain) for chain in updates]
        result_demands = [_WHOLE] * len(results)
        if any(map(_is_asynchronous, fused.instructions.values())):
            for index in _aliased_results(op):  # buffers that an asynchronous collective only passes on
                written[index], result_demands[index] = 0.0, {}
        in_place = {update.name for chain in updates for update in chain}
        demands = _fusion_demands(
            program, fused, zip(producers, result_demands, strict=True), in_place, names
        )
    else:
        in_place_update = op.opcode in _UPDATING and _same_space(operands[0], results[0])
        written = [_update_elements(op, operands)] if in_place_update else [math.inf] * len(results)
        demands = _operand_demands(op, _WHOLE, operands, in_place_update, names)
    bytes_read = sum(
        array.bytes_of(sum(demand.values()))
        for operand, demand in zip(operands, demands, strict=True)
        for array in leaves(operand.type)
        if program.in_hbm(array)
    )
    bytes_written = sum(
        result.bytes_of(elements)
        for result, elements in zip(results, written, strict=True)
        if program.in_hbm(result)
    )
    return bytes_read, bytes_written


def _aliased_results(op: Instruction) -> set[int]:
    """Return the indices of results that share a buffer with an operand."""
    pairs = op.attribute("output_to_operand_aliasing")
    return {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(", pairs)}


def _producers(fused: Computation, results: int) -> list[Instruction]:
    """Return the instruction that computes each result of a fusion. One instruction may compute several."""
    root = fused.instructions[fused.root]
    if root.opcode != "tuple":
        return [root] * results
    return [source for source in fused.sources(root) for _ in leaves(source.type)]


def _same_space(op: Instruction, result: Array) -> bool:
    return next(leaves(op.type)).space == result.space


def _skip_bitcasts(program: Program, fused: Computation, op: Instruction) -> Instruction:
    """Follow bitcasts back from `op`, and return the instruction that computes the bytes."""
    while op.opcode == "bitcast" or (op.opcode == "fusion" and _only_bitcasts(program, op)):
        op = fused.sources(op)[0]
    return op


def _only_bitcasts(program: Program, op: Instruction) -> bool:
    inner = program.computations[op.called("calls")[0]].instructions.values()
    return len(op.operands) == 1 and all(x.opcode in ("parameter", "bitcast") for x in inner)


def _updates(program: Program, fused: Computation, op: Instruction, result: Array) -> list[Instruction]:
    """Return the chain of updates that write a result in place into the buffer of a parameter, or []."""
    chain = []
    while (op := _skip_bitcasts(program, fused, op)).opcode in _UPDATING:
        chain.append(op)
        op = fused.sources(op)[0]
    return chain if op.opcode == "parameter" and _same_space(op, result) else []


def _chain_elements(fused: Computation, updates: Sequence[Instruction]) -> float:
    return sum(_update_elements(op, fused.sources(op)) for op in updates) if updates else math.inf


def _update_elements(op: Instruction, operands: Sequence[Instruction]) -> float:
    """Return the number of elements that a dynamic-update-slice or a scatter writes."""
    position = 1 if op.opcode == "dynamic-update-slice" else (len(operands) - 1) // 2 + 1
    return next(leaves(operands[position].type)).elements


def _fusion_demands(
    program: Program,
    fused: Computation,
    result_demands: Iterable[tuple[Instruction, Demand]],
    in_place: Collection[str],
    names: Sequence[str],
) -> list[Demand]:
    """Return the demand of a fused computation for each of its parameters.

    Args:
      result_demands: the instructions that compute its results, each with the demand for it.
      in_place: names of the updates that write into the buffer of a parameter.
      names: names of the operands of the fusion; equal names identify equal slices.
    """
    demands: dict[str, Demand] = {name: {} for name in fused.instructions}
    for op, demand in result_demands:
        demands[op.name] |= demand
    parameter_names = {op.name: names[int(op.arguments)] for op in fused.parameters}

    def name_of(op: Instruction) -> str:
        op = _skip_bitcasts(program, fused, op)
        if op.opcode == "constant":
            return op.arguments
        return parameter_names.get(op.name) or f"{fused.name}({','.join(names)})%{op.name}"

    for op in reversed(fused.instructions.values()):
        demand = demands[op.name]
        if not demand or op.opcode in SOURCES:
            continue
        sources = fused.sources(op)
        source_names = [name_of(source) for source in sources]
        if op.opcode == "fusion":
            inner = program.computations[op.called("calls")[0]]
            inner_demands = [(producer, demand) for producer in _producers(inner, 1)]
            passed_on = _fusion_demands(program, inner, inner_demands, (), source_names)
        else:
            passed_on = _operand_demands(op, demand, sources, op.name in in_place, source_names)
        for source, part in zip(sources, passed_on, strict=True):
            demands[source.name] |= part
    return [demands[op.name] for op in fused.parameters]


def _operand_demands(
    op: Instruction, demand: Demand, operands: Sequence[Instruction], in_place: bool, names: Sequence[str]
) -> list[Demand]:
    """Return the demand of an operation for each operand, given the demand for its result."""
    opcode, result, count = op.opcode, next(leaves(op.type)), len(operands)
    if opcode in _SLICING:
        key = (opcode, *names[1:], op.attribute("slice"), op.attribute("dynamic_slice_sizes"), result.dims)
        slices = {(key, region): min(elements, result.elements) for region, elements in demand.items()}
        return [slices] + [_WHOLE] * (count - 1)
    if opcode in _UPDATING and in_place:
        if opcode == "dynamic-update-slice":  # overwrites the old elements
            return [{}] + [_WHOLE] * (count - 1)
        arrays = (count - 1) // 2  # a scatter may add to the old elements
        return [{op.name: _update_elements(op, operands)}] * arrays + [_WHOLE] * (count - arrays)
    if opcode in _UPDATING:
        return [demand] + [_WHOLE] * (count - 1)
    if opcode in ("bitcast", "bitcast-convert"):  # these may change the number of elements
        ratio = next(leaves(operands[0].type)).elements / max(result.elements, 1)
        return [{region: elements * ratio for region, elements in demand.items()}]
    return [demand if opcode in _ELEMENTWISE_OPCODES else _WHOLE] * count


def bytes_sent(program: Program, op: Instruction, operands: Sequence[Instruction]) -> float:
    """Return the bytes that a device sends in an operation, including collectives inside a fusion.

    For TPUs, XLA overlaps an asynchronous collective with other operations, in a chain of fusions. Every
    fusion of the chain contains the collective, so it is counted only in the first one.
    """
    if op.opcode == "send":
        return sum(array.bytes for array in leaves(operands[0].type))
    if op.opcode in _COLLECTIVES:
        return _collective(program, op, operands)
    total = 0.0
    if op.opcode == "fusion":
        fused = program.computations[op.called("calls")[0]]
        starts = any('"AsyncCollectiveStart"' in inner.rest for inner in fused.instructions.values())
        for inner in fused.instructions.values():
            if inner.opcode in _COLLECTIVES and (starts or not _is_asynchronous(inner)):
                scattered = [user.opcode for user in fused.users.get(inner.name, [])] == ["dynamic-slice"]
                total += _collective(program, inner, fused.sources(inner), scattered)
    return total


def _is_asynchronous(op: Instruction) -> bool:
    return "chain_id=" in op.rest or '"AsyncCollective' in op.rest


def _collective(
    program: Program, op: Instruction, operands: Sequence[Instruction], scattered: bool = False
) -> float:
    """Return the bytes that a device sends in a collective over a ring.

    Args:
      scattered: whether each device keeps only its shard of the result of an all-reduce.
    """
    operand_bytes = sum(array.bytes for operand in operands for array in leaves(operand.type))
    if op.opcode == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute("source_target_pairs"))
        messages = collections.Counter(source for source, target in pairs if source != target)
        return operand_bytes * max(messages.values(), default=0)
    n = _group_size(program, op)
    if op.opcode == "all-reduce" and not scattered:
        return operand_bytes * 2 * (n - 1) / n
    if op.opcode == "collective-broadcast":
        return operand_bytes if n > 1 else 0.0
    whole = operand_bytes if op.opcode != "all-gather" else sum(array.bytes for array in leaves(op.type))
    return whole * (n - 1) / n


def _group_size(program: Program, op: Instruction) -> int:
    """Return the number of devices in each group of a collective.

    Raises:
      UserError: the notation of the groups is unknown.
    """
    text = op.rest[op.rest.find("replica_groups=") + len("replica_groups=") :]
    if match := re.match(r"\{\{([\d,]*)\}", text):  # {{0,1},{2,3}}
        return len(match[1].split(","))
    if text.startswith("{}"):
        return program.devices
    if match := re.match(r"\[(?:\d+,)*(\d+)\]<=", text):  # [2,4]<=[8]: two groups of four devices
        return int(match[1])
    # mesh['x'=2,'y'=4] {'y'}: groups along axis y, of size 4. {'y':(1)2}: groups along a part of y, of size 2
    if match := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sides[axis]) for axis, part in axes)
    raise UserError(f"cannot read the groups of %{op.name}: {text[:60]!r}")
