"""Parse the text of a compiled XLA program into computations, instructions and arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from structvit_jax.utils.errors import UserError

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")


class Array(NamedTuple):
    """An array type with its layout."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # of the dims, minor first
    tile: tuple[int, ...]  # the outermost tile, major first; () without tiling
    space: int  # memory space, the layout's S(n); 0 without one
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

    def part(self, elements: float) -> float:
        """Return the bytes of some of the elements, with padding in proportion."""
        return self.bytes * min(1.0, elements / self.elements) if self.elements else 0.0


Type = Array | tuple["Type", ...]  # a tuple type holds the types of its elements


def opcodes(text: str) -> frozenset[str]:
    """Return the opcodes in a text, which spaces separate."""
    return frozenset(text.split())


def leaves(kind: Type) -> Iterator[Array]:
    """Yield the arrays of a type, in order."""
    if isinstance(kind, Array):
        yield kind
    else:
        for part in kind:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: %name = type opcode(arguments), rest."""

    name: str
    type: Type
    opcode: str
    arguments: str
    rest: str  # attributes, metadata and backend_config, as printed

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        if self.opcode in ("constant", "parameter", "iota"):
            return ()
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @functools.cached_property
    def op_name(self) -> str:
        """Name scopes from JAX, "" without any."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """Return the computations in attributes such as calls, body or branch_computations."""
        found = []
        for key in keys:
            if match := re.search(rf"(?:^|, ){key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest):
                found += [name.strip(" %") for name in match[1].strip("{}").split(",")]
        return found

    def attribute(self, key: str) -> str:
        """Return an attribute up to its closing brace or quote, "" if it is missing."""
        match = re.search(rf'(?:^|, ){key}=("[^"]*"|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,]*)', self.rest)
        return match[1].strip('"') if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program; its root instruction gives the result."""

    name: str
    instructions: dict[str, Instruction]  # operands come before their users
    root: str

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
    tiled: bool  # layouts have tiles, as those of TPU programs

    def in_hbm(self, array: Array) -> bool:
        """Return whether an array is in the main memory of the device.

        On TPUs a layout without S(n) is in HBM. S(1) is vector memory, S(6) scalar memory, S(2) and S(4) hold
        semaphores, S(5) is host memory. On other devices only S(5) is outside.
        """
        return array.space == 0 if self.tiled else array.space != 5


def unwrap_async_start(op: Instruction) -> Instruction:
    """Return the operation that an asynchronous start begins; return other operations as they are.

    A start yields (operands, result, semaphores), that of a copy (result, operand, semaphore); the returned
    operation yields the result only.
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
      UserError: text that is no compiled XLA program.
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
                raise UserError(f"computation {header[2]!r} has no ROOT: the text is cut or damaged")
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
    kind, end = _type(text, 0)
    match = _OPCODE.match(text, end)
    if match is None:
        raise UserError(f"cannot read the operation of %{name}: {text[end : end + 40]!r}")
    close = _closing(text, match.end() - 1)
    return Instruction(name, kind, match[1], text[match.end() : close], text[close + 1 :].lstrip(", "))


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`, skipping strings."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    raise UserError(f"a parenthesis does not close: {text[start : start + 60]!r}")


def _type(text: str, start: int) -> tuple[Type, int]:
    """Return the type that begins at `start`, and the index of its end."""
    if text[start] != "(":
        match = _ARRAY.match(text, start)
        if match is None:
            raise UserError(f"cannot read the type {text[start : start + 60]!r}")
        return _array(match), match.end()
    parts: list[Any] = []
    start += 1
    while text[start] != ")":
        part, start = _type(text, start)
        parts.append(part)
        while text[start] in ", ":
            start += 1
    return tuple(parts), start + 1


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
