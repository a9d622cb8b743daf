"""Parse the text of a compiled XLA program: computations, instructions, arrays and name scopes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from structvit_jax.utils.errors import UserError

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")


class Array(NamedTuple):
    """An array type with its layout."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # axes from the fastest (minor) to the slowest in memory
    tile: tuple[int, ...]  # sides of the outermost tile, slowest axis first; () without tiling
    space: int  # memory space: n if the layout has S(n), otherwise 0
    bits: int  # per element

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in memory, padded to whole tiles. Scalars are not padded."""
        padded = list(self.dims)
        for axis, side in zip(self.order, reversed(self.tile), strict=False):
            padded[axis] = -(-padded[axis] // side) * side
        missing = self.tile[: -len(self.dims)] if self.dims else ()
        return math.prod(padded) * math.prod(missing) * self.bits // 8

    def bytes_of(self, elements: float) -> float:
        """Return the bytes of a number of elements, with a proportional part of the padding."""
        return self.bytes * min(1.0, elements / self.elements) if self.elements else 0.0


Type = Array | tuple["Type", ...]  # a tuple type holds the types of its elements


def leaves(type_: Type) -> Iterator[Array]:
    """Yield the arrays of a type, in order."""
    if isinstance(type_, Array):
        yield type_
    else:
        for element in type_:
            yield from leaves(element)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `%name = type opcode(arguments), rest`."""

    name: str
    type: Type
    opcode: str
    arguments: str
    rest: str  # attributes, metadata and backend_config, as text

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        if self.opcode in ("constant", "parameter", "iota"):
            return ()
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @functools.cached_property
    def op_name(self) -> str:
        """The name scopes of JAX, such as "jit(step)/jvp(stage1)/mul"; "" if there are none."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1] if match else ""

    def attribute(self, key: str) -> str:
        """Return the value of an attribute, without quotes; "" if it is missing."""
        match = re.search(rf'(?:^|, ){key}=("[^"]*"|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,]*)', self.rest)
        return match[1].strip('"') if match else ""

    def called(self, *keys: str) -> list[str]:
        """Return the names of computations in attributes such as "calls", "body", "branch_computations"."""
        return [name for key in keys for name in re.findall(r"[\w.\-]+", self.attribute(key))]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program."""

    name: str
    instructions: dict[str, Instruction]  # by name; operands come before their users
    root: str  # name of the instruction that computes the result

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [op for op in self.instructions.values() if op.opcode == "parameter"]
        return sorted(found, key=lambda op: int(op.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for op in self.instructions.values():
            for name in op.operands:
                found.setdefault(name, []).append(op)
        return found

    def sources(self, op: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in op.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int  # partitions x replicas
    tiled: bool  # whether layouts have tiles, as in programs for TPUs

    def in_hbm(self, array: Array) -> bool:
        """Return whether an array is in the main memory of the device.

        On TPUs this is memory space 0. The others are S(1) for vector memory, S(6) for scalar memory, S(5)
        for host memory, and S(2) and S(4) for semaphores. On other devices, all arrays except those in host
        memory are in the main memory.
        """
        return array.space == 0 if self.tiled else array.space != 5


def unwrap_async_start(op: Instruction) -> Instruction:
    """Turn an asynchronous start, such as all-gather-start, into the operation itself; keep other operations.

    The type of a start is (operands, result, semaphores), or (result, operand, semaphore) for a copy-start.
    The returned operation has the type of the result.
    """
    kind = op.opcode.removesuffix("-start")
    if kind == op.opcode or kind == "async":
        return op
    index = {"copy": 0, "all-reduce": None}.get(kind, 1)
    result = op.type if index is None or isinstance(op.type, Array) else op.type[index]
    return dataclasses.replace(op, opcode=kind, type=result)


def parse(text: str) -> Program:
    """Parse the text of `compiled.as_text()`.

    Raises:
      UserError: the text is not a compiled XLA program.
    """
    computations: dict[str, Computation] = {}
    entry = header = root = None
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header is None:
            if (header := _HEADER.match(line)) is not None:
                instructions, root = {}, None
        elif line.startswith("}"):
            if root is None:
                raise UserError(f"computation {header[2]!r} has no ROOT: the text is truncated or damaged")
            computations[header[2]] = Computation(header[2], instructions, root)
            entry = header[2] if header[1] else entry
            header = None
        elif match := _INSTRUCTION.match(line):
            instructions[match[2]] = _instruction(match[2], line[match.end() :])
            root = match[2] if match[1] else root
        elif line.strip():
            raise UserError(f"cannot read this line of a program: {line[:80]!r}")
    if entry is None:
        raise UserError("no ENTRY computation: pass all of compiled.as_text()")
    header_line = text.partition("\n")[0]
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", header_line)))
    return Program(computations, computations[entry], devices, tiled=":T(" in text)


def _instruction(name: str, text: str) -> Instruction:
    text = re.sub(r"/\*index=\d+\*/", "", text)
    type_, end = _type(text, 0)
    match = _OPCODE.match(text, end)
    if match is None:
        raise UserError(f"cannot read the operation of %{name}: {text[end : end + 40]!r}")
    close = _closing(text, match.end() - 1)
    return Instruction(name, type_, match[1], text[match.end() : close], text[close + 1 :].lstrip(", "))


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`. Skip parentheses in strings."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    raise UserError(f"a parenthesis does not close: {text[start : start + 60]!r}")


def _type(text: str, start: int) -> tuple[Type, int]:
    """Return the type that begins at `start`, and the index after it."""
    if text[start] != "(":
        match = _ARRAY.match(text, start)
        if match is None:
            raise UserError(f"cannot read the type {text[start : start + 60]!r}")
        return _array(match), match.end()
    elements: list[Type] = []
    start += 1
    while text[start] != ")":
        element, start = _type(text, start)
        elements.append(element)
        while text[start] in ", ":
            start += 1
    return tuple(elements), start + 1


def _array(match: re.Match) -> Array:
    dtype, dims, order, layout = match.groups()
    marks = dict(re.findall(r"([A-Z])((?:\([^)]*\))+)", layout or ""))
    tile = re.match(r"\(([^)]*)\)", marks.get("T", "()"))
    assert tile is not None
    if "*" in tile[1]:
        raise UserError(f"the tiling of {match[0]!r} joins dimensions, which is not supported")
    width = re.match(r"[a-z]+(\d+)", dtype)
    bits = 0 if dtype in ("token", "opaque") else max(8, int(width[1])) if width else 8
    return Array(
        dtype,
        tuple(int(side.lstrip("<=")) for side in dims.split(",") if side.strip()),
        tuple(int(axis) for axis in (order or "").split(",") if axis),
        tuple(int(side) for side in tile[1].split(",") if side),
        int(marks.get("S", "(0)").strip("()")),
        int(marks["E"].strip("()")) if "E" in marks else bits,
    )


# Name scopes that JAX adds and that are no part of a model. Transforms such as jvp(scope) are handled below.
_ADDED_SCOPE = re.compile(
    r"|while|body|cond|scan|times\d+|branch_\d+_fun|closed_call|core_call|checkpoint|remat\d?|shard_map|pmap"
    r"|rematted_computation|custom_[jv][vj]p_call\w*|p?jit(\(.*\))?|pallas_call|.*->.*"
)


def part_of(op_name: str, depth: int = 1) -> str:
    """Return the name of the part of a model that an operation belongs to, such as "backward stage1".

    The name has a phase and the outermost name scopes; it is "other" if the operation has neither. The phase
    is "backward" if the operation is in a `transpose`, and "forward" if it is only in a `jvp`. For example,
    "jit(step)/transpose(jvp(stage1))/mul" belongs to "backward stage1".

    Args:
      op_name: name scopes, as from `Instruction.op_name`.
      depth: number of name scopes in the returned name.
    """
    # XLA names an operation that it merged from several "common/(rest:rest)". Keep the common scopes.
    op_name = re.sub(r"/\(.*", "/", op_name.split(";")[0])
    phase = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    scopes = []
    for scope in op_name.split("/")[:-1]:
        while match := re.fullmatch(r"(?:transpose|jvp|vmap|checkpoint|remat)\((.*)\)", scope):
            scope = match[1]
        if not _ADDED_SCOPE.fullmatch(scope):
            scopes.append(scope)
    return " ".join(filter(None, [phase, "/".join(scopes[:depth])])) or "other"


def op_names(program: Program, computation: Computation, outer: str) -> dict[str, str]:
    """Return the name scopes of all instructions, by name of the instruction.

    Copies that XLA inserted have no name scopes of their own. A copy out of HBM gets those of its user, and a
    copy into HBM those of its source. Instructions that still have none get `outer`.
    """
    instructions = computation.instructions.values()
    by_source = {op.name: op.op_name for op in instructions if "/" in op.op_name}
    by_user = dict(by_source)
    for op in instructions:
        sources = (by_source[name] for name in op.operands if name in by_source)
        by_source.setdefault(op.name, next(sources, ""))
    for op in reversed(instructions):
        users = (by_user[user.name] for user in computation.users.get(op.name, []) if by_user[user.name])
        by_user.setdefault(op.name, next(users, ""))

    names = {}
    for op in instructions:
        result = next(leaves(unwrap_async_start(op).type), None)
        leaves_hbm = result is not None and not program.in_hbm(result)
        first, second = (by_user, by_source) if leaves_hbm else (by_source, by_user)
        names[op.name] = first[op.name] or second[op.name] or outer
    return names
