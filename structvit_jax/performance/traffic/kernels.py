"""Count the traffic of a Pallas kernel for TPUs from its Mosaic module, not from its cost estimate.

Blocks move as in the pipeline that Pallas builds. A block is fetched if its index differs from the index at
the previous grid step, and stored if its index differs from the index at the next step. The part of a block
that is outside the array does not count. The kernel is assumed to run on one core.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from structvit_jax.performance.traffic.loops import ARITHMETIC, COMPARISONS
from structvit_jax.performance.traffic.program import Array, Instruction
from structvit_jax.utils.errors import UserError

if TYPE_CHECKING:
    from jaxlib.mlir import ir

TARGET = '"tpu_custom_call"'

_ARITHMETIC = {
    "arith.addi": "add",
    "arith.subi": "subtract",
    "arith.muli": "multiply",
    "arith.minsi": "minimum",
    "arith.maxsi": "maximum",
    "arith.andi": "and",
    "arith.ori": "or",
    "arith.xori": "xor",
    "arith.divsi": "divide",
    "arith.remsi": "remainder",
    "arith.select": "select",
}
_SAME_VALUE = ("arith.index_cast", "arith.extui", "arith.extsi", "arith.trunci")


def kernel_traffic(op: Instruction, arrays: Sequence[Array]) -> list[float]:
    """Return the bytes that a kernel reads from each operand, then the bytes that it writes to each result.

    An array that is not split into blocks is counted once. If the blocks of a kernel depend on data, or if it
    starts its own copies, its traffic does not follow from its grid; each of its arrays is then counted once.

    Args:
      op: the call of the kernel.
      arrays: the operands of the kernel, then its results.

    Raises:
      UserError: this jaxlib cannot parse the kernel.
    """
    from jaxlib.mlir import ir

    with ir.Context() as context, ir.Location.unknown():
        module = _parse(op, context)
        functions = {ir.StringAttr(f.attributes["sym_name"]).value: f.operation for f in module.body}
        main = next(f for f in functions.values() if "scalar_prefetch" in f.attributes)
        prefetched = ir.IntegerAttr(main.attributes["scalar_prefetch"]).value
        has_blocks = "iteration_bounds" in main.attributes and "window_params" in main.attributes
        if prefetched or not has_blocks or "tpu.enqueue" in str(main):
            return [array.bytes for array in arrays]
        steps = list(itertools.product(*map(range, _integers(main.attributes["iteration_bounds"]))))
        windows: Any = main.attributes["window_params"]
        traffic: list[float] = []
        for array, window in zip(arrays, windows, strict=True):
            if "transform_indices" not in window:  # the whole array
                traffic.append(array.bytes)
                continue
            index_map = functions[ir.FlatSymbolRefAttr(window["transform_indices"]).value]
            indices = [_evaluate(op, index_map.regions[0].blocks[0], step) for step in steps]
            shape = _integers(window["window_bounds"])
            if "window_kind" not in window:  # the index map returns indices of blocks, not of elements
                indices = [[i * side for i, side in zip(index, shape, strict=True)] for index in indices]
            traffic.append(sum(_block_bytes(array, start, shape) for start, _ in itertools.groupby(indices)))
    return traffic


def _parse(op: Instruction, context: ir.Context) -> ir.Module:
    """Return the module of a kernel. It has a function for the body, and one for each index map."""
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


def _integers(attribute: ir.Attribute) -> list[int]:
    from jaxlib.mlir import ir

    return list(ir.DenseI64ArrayAttr(attribute))


def _evaluate(kernel: Instruction, index_map: ir.Block, step: Sequence[int]) -> list[int]:
    """Evaluate an index map: return the index of a block at a step of the grid."""
    from jaxlib.mlir import ir

    values: dict[Any, int] = dict(zip(index_map.arguments, step, strict=True))
    for op in index_map.operations:
        name, operands = op.operation.name, [values[operand] for operand in op.operands]
        if name == "func.return":
            return operands
        if name == "arith.constant":
            value = ir.IntegerAttr(op.attributes["value"]).value
        elif name == "arith.cmpi":  # predicates eq, ne, slt, sle, sgt, sge, and unsigned ones
            compare = [*COMPARISONS.values()]
            value = compare[ir.IntegerAttr(op.attributes["predicate"]).value](*operands)
        elif name in _SAME_VALUE:
            value = operands[0]
        elif name in _ARITHMETIC:
            value = ARITHMETIC[_ARITHMETIC[name]](*operands)
        else:
            raise UserError(f"unknown operation {name} in an index map of the kernel %{kernel.name}")
        values[op.results[0]] = int(value)
    raise AssertionError("an index map ends with func.return")


def _block_bytes(array: Array, start: Sequence[int], shape: Sequence[int]) -> int:
    """Return the bytes of the part of a block that is inside the array."""
    sides = [max(0, min(side, whole - at)) for at, side, whole in zip(start, shape, array.dims, strict=True)]
    return array._replace(dims=tuple(sides)).bytes
