"""Bytes that collectives send to other devices."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

from structvit_jax.performance.traffic.program import Computation, Instruction, Program, leaves, opcodes
from structvit_jax.utils.errors import UserError

COLLECTIVES = opcodes(
    "all-gather all-reduce all-to-all collective-broadcast collective-permute ragged-all-to-all"
    " reduce-scatter"
)


def sent(
    program: Program, op: Instruction, operands: Sequence[Instruction], scattered: bool = False
) -> float:
    """Return the bytes that a device sends in a collective over a ring.

    Args:
      scattered: whether each device keeps only its slice of an all-reduce.
    """
    given = sum(array.bytes for operand in operands for array in leaves(operand.type))
    if op.opcode == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute("source_target_pairs"))
        times = collections.Counter(source for source, target in pairs if source != target)
        return given * max(times.values(), default=0)
    n = group_size(program, op)
    if op.opcode == "all-reduce" and not scattered:
        return given * 2 * (n - 1) / n
    if op.opcode == "collective-broadcast":
        return given if n > 1 else 0.0
    whole = given if op.opcode != "all-gather" else sum(array.bytes for array in leaves(op.type))
    return whole * (n - 1) / n


def group_size(program: Program, op: Instruction) -> int:
    """Return the number of devices in a group of a collective.

    Raises:
      UserError: groups in an unknown notation.
    """
    text = op.rest[op.rest.find("replica_groups=") + len("replica_groups=") :]
    if match := re.match(r"\{\{([\d,]*)\}", text):  # {{0,1},{2,3}}
        return len(match[1].split(","))
    if text.startswith("{}"):
        return program.devices
    if match := re.match(r"\[(?:\d+,)*(\d+)\]<=", text):  # [2,4]<=[8]: two groups of four
        return int(match[1])
    # mesh['x'=2,'y'=4] {'y'}, of which {'y':(1)2} takes a part of size 2
    if match := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sides = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sides[axis]) for axis, part in axes)
    raise UserError(f"the groups of %{op.name} cannot be read: {text[:60]!r}")


def asynchronous(op: Instruction) -> bool:
    """Return whether this belongs to an asynchronous collective.

    XLA for TPUs overlaps those with other work, in several fusions that all repeat the collective; the first
    one contains an AsyncCollectiveStart.
    """
    return "chain_id=" in op.rest or '"AsyncCollective' in op.rest


def starts(fused: Computation) -> bool:
    """Return whether a fusion starts an asynchronous collective."""
    return any('"AsyncCollectiveStart"' in op.rest for op in fused.instructions.values())


def sent_within(program: Program, fused: Computation) -> float:
    """Return the bytes sent in the collectives of a fusion; each chain of fusions counts once."""
    total = 0.0
    for op in fused.instructions.values():
        if op.opcode in COLLECTIVES and (not asynchronous(op) or starts(fused)):
            users = fused.users.get(op.name, [])
            scattered = [user.opcode for user in users] == ["dynamic-slice"]
            total += sent(program, op, fused.sources(op), scattered)
    return total
