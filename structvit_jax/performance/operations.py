"""The operations of a traced program: what its matrix products and convolutions multiply and add."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def operations(program: Any) -> float:
    """Multiplications and additions of the matrix products and convolutions of a ClosedJaxpr, as
    `jax.make_jaxpr` and `.trace(...).jaxpr` give it.

    Loops count as often as they run, what is computed again for the backward pass counts again, and a kernel
    that declares its cost has that. Of a choice the largest branch counts, of one by platform the default:
    that is the definition, and fast forms may compute more. Zeros that a convolution pads or dilates with are
    not multiplied. All else is left out, as `cost` does.
    """
    return _count(program.jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(map(_of, jaxpr.eqns))


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2.0
            * equation.outvars[0].aval.size
            * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        )
    if name == "conv_general_dilated":
        return _convolution(equation)
    called = params.get("target_name", name)
    if called.startswith(("dot_product_attention", "structvit_attention")):  # cuDNN's, and ours for CPUs
        query, key = (v.aval for v in equation.invars[:2])  # [batch, length, ...]
        backward = called.endswith("backward") or "bwd" in called
        return (5 if backward else 2) * 2.0 * query.size * key.shape[1]  # so many products
    if called.startswith("structvit_depthwise"):  # for CPUs
        first, second = (v.aval for v in equation.invars[:2])
        result = equation.outvars[0].aval
        kernel = result if called.endswith("of_kernel") else second
        outputs = {"forward": result, "of_input": first, "of_kernel": second}[
            called[len("structvit_depthwise_") :]
        ]
        return 2.0 * outputs.size * math.prod(kernel.shape[:-2])
    if name == "cond":
        branches, platforms = params["branches"], params.get("branches_platforms") or ()
        if None in platforms:
            branches = [branches[platforms.index(None)]]
        return max(_count(branch.jaxpr) for branch in branches)
    if name == "while":
        inner = _count(params["body_jaxpr"].jaxpr)
        if inner:
            raise NotImplementedError("a loop of unknown length with operations in it")
        return 0.0
    times = params["length"] if name == "scan" else 1
    if name == "pallas_call":
        if params["cost_estimate"] is not None:
            return float(params["cost_estimate"].flops)
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(_count(inner) for inner in _inner(params))


def _inner(params: Any) -> Any:
    """The programs among an equation's parameters; a rule for differentiation is not run here."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            yield getattr(params[key], "jaxpr", params[key])
            return


def _convolution(equation: Any) -> float:
    inputs, kernel = (v.aval for v in equation.invars)
    output, params = equation.outvars[0].aval, equation.params
    layout = params["dimension_numbers"]
    pairs = 1
    for axis, (source, window, target) in enumerate(
        zip(layout.lhs_spec[2:], layout.rhs_spec[2:], layout.out_spec[2:], strict=True)
    ):
        # places of the input that the window's taps see from each output, zeros aside
        places = (
            np.arange(output.shape[target])[:, None] * params["window_strides"][axis]
            + np.arange(kernel.shape[window])[None, :] * params["rhs_dilation"][axis]
            - params["padding"][axis][0]
        )
        dilation = params["lhs_dilation"][axis]
        last = (inputs.shape[source] - 1) * dilation
        pairs *= int(((places >= 0) & (places <= last) & (places % dilation == 0)).sum())
    channels = kernel.shape[layout.rhs_spec[1]]  # of one group
    outputs = output.shape[layout.out_spec[0]] * output.shape[layout.out_spec[1]]
    return 2.0 * pairs * channels * outputs
