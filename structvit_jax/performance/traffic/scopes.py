"""The part of the model that an operation belongs to, from the name scopes in its metadata."""

from __future__ import annotations

import re

from structvit_jax.performance.traffic.program import (
    Computation,
    Instruction,
    Program,
    leaves,
    unwrap_async_start,
)

# Scopes that JAX adds, except for transforms such as jvp(scope).
_ADDED = re.compile(
    r"|while|body|cond|scan|times\d+|branch_\d+_fun|closed_call|core_call|checkpoint|remat\d?|shard_map|pmap"
    r"|rematted_computation|custom_[jv][vj]p_call\w*|p?jit(\(.*\))?|pallas_call|.*->.*"
)


def part_of(op_name: str, depth: int = 1) -> str:
    """Return the part of an operation: its phase, if it is differentiated, and its outer name scopes.

    The phase is "forward" (jvp in the name) or "backward" (transpose): the part of "jit(step)/transpose(jvp(
    stage1))/mul" is "backward stage1". Without phase and scopes it is "other".
    """
    op_name = op_name.split(";")[0]
    phase = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    found = []
    for scope in op_name.split("/")[:-1]:
        while match := re.fullmatch(r"(?:transpose|jvp|vmap|checkpoint|remat)\((.*)\)", scope):
            scope = match[1]
        if not _ADDED.fullmatch(scope):
            found.append(scope)
    return " ".join(filter(None, [phase, "/".join(found[:depth])])) or "other"


def op_names(program: Program, computation: Computation, outer: str) -> dict[str, str]:
    """Return the name scopes of every instruction.

    Copies that XLA inserted have none: a copy out of HBM takes the name of its user, a copy into HBM that of
    its source, and others `outer`.
    """
    found = {op.name: op.op_name for op in computation.instructions.values() if "/" in op.op_name}
    by_source, by_user = dict(found), dict(found)
    for op in computation.instructions.values():
        known = (by_source[name] for name in op.operands if name in by_source)
        by_source.setdefault(op.name, next(known, ""))
    for op in reversed(computation.instructions.values()):
        known = (by_user[user.name] for user in computation.users.get(op.name, []) if by_user[user.name])
        by_user.setdefault(op.name, next(known, ""))

    def name_of(op: Instruction) -> str:
        result = next(leaves(unwrap_async_start(op).type), None)
        inward = result is not None and not program.in_hbm(result)
        first, second = (by_user, by_source) if inward else (by_source, by_user)
        return first[op.name] or second[op.name] or outer

    return {op.name: name_of(op) for op in computation.instructions.values()}
