"""Traffic of a Pallas kernel for TPUs, from its Mosaic module instead of its cost estimate.

As in the pipeline that Pallas builds, a block is fetched if its index differs from that of the previous step,
and stored if the index of the next step differs; blocks are cut off at the edge of the array. Operands left
in HBM count by the copies (DMA) that the body starts. The kernel is assumed to run on one core.
"""

from __future__ import annotations

import base64
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from structvit_jax.performance.traffic.loops import quotient
from structvit_jax.performance.traffic.program import Array, Instruction, leaves
from structvit_jax.utils.errors import UserError

TARGET = '"tpu_custom_call"'

_BINARY: dict[str, Callable] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.divsi": quotient,
    "arith.divui": operator.floordiv,
    "arith.floordivsi": operator.floordiv,
    "arith.remsi": lambda a, b: a - b * quotient(a, b),
    "arith.remui": operator.mod,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.select": lambda which, a, b: a if which else b,
}
_SAME = ("arith.index_cast", "arith.extui", "arith.extsi", "arith.trunci")
_COMPARE = (operator.eq, operator.ne, *[operator.lt, operator.le, operator.gt, operator.ge] * 2)


class KernelTraffic(NamedTuple):
    """Bytes that one call of a kernel moves."""

    read: list[float]  # of each operand
    written: list[float]  # of each result
    sent: float  # to other devices


class _Reference(NamedTuple):
    """A view of an argument of the kernel body."""

    argument: int


def kernel_traffic(op: Instruction, operands: Sequence[Array]) -> KernelTraffic:
    """Return the bytes that a call of a kernel moves if all operands and results are in HBM.

    Raises:
      UserError: a kernel whose copies depend on what it reads, or that this jaxlib cannot parse.
    """
    from jaxlib.mlir import ir

    arrays = [*operands, *leaves(op.type)]
    with ir.Context() as context, ir.Location.unknown():
        module = _module(op, context)
        functions = {ir.StringAttr(f.attributes["sym_name"]).value: f.operation for f in module.body}
        main = next(f for f in functions.values() if "scalar_prefetch" in f.attributes)
        attributes, body = main.attributes, main.regions[0].blocks[0]
        first = ir.IntegerAttr(attributes["scalar_prefetch"]).value
        grid = _integers(attributes, "iteration_bounds")
        steps = list(itertools.product(*map(range, grid)))
        walk = _Walk(op.name)
        if "tpu.enqueue" in str(main):
            for step in steps:
                refs = [_Reference(index) for index in range(len(body.arguments) - len(grid))]
                walk.run(body, [*step, *refs])
        moved = [float(array.bytes) for array in arrays[:first]]  # prefetched scalars
        for index, array in enumerate(arrays[first:]):
            window = attributes["window_params"][index] if "window_params" in attributes else {}
            if "transform_indices" in window:
                map_name = ir.FlatSymbolRefAttr(window["transform_indices"]).value
                where = functions[map_name].regions[0].blocks[0]
                indices = [walk.run(where, [*step, *[None] * first]) for step in steps]
                moved.append(
                    _blocks(indices, _integers(window, "window_bounds"), "window_kind" in window, array)
                )
            elif _in_hbm(body.arguments[len(grid) + first + index]):
                moved.append(walk.moved.get(first + index, 0.0))
            else:
                moved.append(array.bytes)  # the whole array, to vector memory
    return KernelTraffic(moved[: len(operands)], moved[len(operands) :], walk.sent)


def _module(op: Instruction, context: Any) -> Any:
    """Return the module of the kernel: functions for the body and for the index map of each window."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.passmanager import PassManager
    from jaxlib.mosaic.python import tpu

    match = re.search(r'"body":"([^"]*)"', op.rest)
    if match is None:
        raise UserError(f"the kernel %{op.name} has no body in its backend_config")
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    try:
        module = ir.Module.parse(base64.b64decode(match[1]))
        PassManager.parse("builtin.module(mosaic-serde{serialize=false})").run(module.operation)
    except (ir.MLIRError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"this jaxlib cannot read the kernel %{op.name}: {reason}") from error
    return module


def _integers(attributes: Any, key: str) -> list[int]:
    from jaxlib.mlir import ir

    return list(ir.DenseI64ArrayAttr(attributes[key])) if key in attributes else []


def _in_hbm(value: Any) -> bool:
    return re.search(r"memory_space<(any|hbm)>", str(value.type)) is not None


def _blocks(indices: Sequence[list], bounds: Sequence[int], by_element: bool, array: Array) -> float:
    """Return the bytes of the blocks at these indices; consecutive equal ones count once."""
    total, before = 0.0, None
    for index in indices:
        if index != before or None in index:
            sides = []
            for at, bound, side in zip(index, bounds, array.dims, strict=True):
                start = 0 if at is None else at if by_element else at * bound
                sides.append(max(0, min(bound, side - start)))
            total += array._replace(dims=tuple(sides)).bytes
        before = index
    return total


class _Walk:
    """Evaluates the integers of a function and adds up its copies; values read from memory are None."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.moved: dict[int, float] = {}  # bytes of each argument in HBM
        self.sent = 0.0
        self.values: dict[Any, Any] = {}

    def run(self, block: Any, arguments: Sequence[Any]) -> list:
        """Run a block; return what its last operation returns or yields."""
        self.values.update(zip(block.arguments, arguments, strict=True))
        for op in block.operations:
            operands = [self.values.get(value) for value in op.operands]
            if op.operation.name in ("func.return", "scf.yield"):
                return operands
            results = self._results(op.operation, operands)
            self.values.update(zip(op.results, results, strict=True))
        return []

    def _results(self, op: Any, operands: list) -> Sequence[Any]:
        from jaxlib.mlir import ir

        unknown = [None] * len(op.results)
        if op.name == "arith.constant":
            value = op.attributes["value"]
            return [ir.IntegerAttr(value).value] if isinstance(value, ir.IntegerAttr) else unknown
        if op.name in ("scf.if", "scf.for"):
            return self._if(op, operands) if op.name == "scf.if" else self._for(op, operands)
        if op.name == "tpu.enqueue_dma":
            self._copy(op, operands)
        elif (len(op.regions) and "tpu.enqueue" in str(op)) or op.name.startswith("tpu.enqueue"):
            raise UserError(f"the kernel %{self.kernel} copies within {op.name}, which cannot be counted")
        if any(isinstance(known, _Reference) for known in operands):
            views = [str(result.type).startswith("memref") for result in op.results]
            return [operands[0] if view else None for view in views]  # None: read from memory
        if None in operands or op.name not in (*_BINARY, *_SAME, "arith.cmpi"):
            return unknown
        if op.name in _SAME:
            return operands
        work = _BINARY.get(op.name)
        if work is None:
            work = _COMPARE[ir.IntegerAttr(op.attributes["predicate"]).value]
        return [int(work(*operands))]

    def _if(self, op: Any, operands: list) -> Sequence[Any]:
        if operands[0] is None:
            self._refuse_copies(op)
            return [None] * len(op.results)
        region = op.regions[0 if operands[0] else 1]
        return self.run(region.blocks[0], []) if len(region.blocks) else []

    def _for(self, op: Any, operands: list) -> Sequence[Any]:
        low, high, step, *carried = operands
        if None in (low, high, step):
            self._refuse_copies(op)
            return [None] * len(op.results)
        for at in range(low, high, step):
            carried = self.run(op.regions[0].blocks[0], [at, *carried])
        return carried

    def _refuse_copies(self, op: Any) -> None:
        if "tpu.enqueue" in str(op):
            raise UserError(
                f"the copies of kernel %{self.kernel} depend on what it reads; they cannot be counted"
            )

    def _copy(self, op: Any, operands: list) -> None:
        """Add a copy (DMA) between HBM and the chip, or to another device."""
        ends = [
            (value, known)
            for value, known in zip(op.operands, operands, strict=True)
            if str(value.type).startswith("memref") and "semaphore" not in str(value.type)
        ]
        shape = re.match(r"memref<((?:\d+x)*)[a-z]*(\d+)", str(ends[0][0].type))
        assert shape is not None
        size = math.prod(int(side) for side in shape[1].split("x") if side) * int(shape[2]) / 8
        for value, known in ends:
            if _in_hbm(value) and known is not None:
                self.moved[known.argument] = self.moved.get(known.argument, 0.0) + size
        if "device_id" in str(op):
            self.sent += size
