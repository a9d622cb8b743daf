"""Count parameters and arithmetic: of a model by part and kind, and of any traced program.

Both count the matrix products and convolutions of a jaxpr. Normalisation, softmax, GELU and biases are left
out; they add less than 0.5 %.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from structvit_jax.models.layers import Conv, DepthwiseConv, Linear, Mlp, Pointwise
from structvit_jax.models.networks import create_model
from structvit_jax.models.struct_attention import StructAttention
from structvit_jax.models.variants import get_variant
from structvit_jax.ops import use_kernels

_LAYERS = (StructAttention, Mlp, Linear, Conv, DepthwiseConv)  # every product of a model is in one of these


@dataclasses.dataclass(frozen=True)
class Part:
    """Cost of one part of a model."""

    params: int  # trainable parameters
    macs: int  # multiply-accumulates for one example


@dataclasses.dataclass(frozen=True)
class Cost(Part):
    """Cost of a whole model."""

    parts: dict[str, Part]  # by top-level module, in the order of the forward pass
    kinds: dict[str, int]  # multiply-accumulates by kind: conv, depthwise, linear, structure, attention


def cost(name: str, input_shape: Sequence[int], num_classes: int, **overrides: Any) -> Cost:
    """Count the parameters and multiply-accumulates of a model for one example.

    Products with the zeros around a convolution are counted, as papers do. Resizing the learned positions of
    a DeiT is not.

    Args:
      name, num_classes, **overrides: as for `create_model`.
      input_shape: [height, width, 3] or [time, height, width, 3], without batch.

    Raises:
      UserError: an unknown name or override, or a shape that the model does not take.
    """
    depths = get_variant(name, **overrides).depths
    # Blocks of a stage are equal: trace one of each. The other two do not change what the model computes.
    overrides |= {"depths": tuple(min(depth, 1) for depth in depths)}
    overrides |= {"remat": "none"}
    model = create_model(name, num_classes=num_classes, seed=None, **overrides)
    stages = ["blocks"] if len(depths) == 1 else [f"blocks{stage}" for stage in range(1, len(depths) + 1)]
    repeats = dict(zip(stages, depths, strict=True))

    params, macs, kinds = (collections.Counter[str]() for _ in range(3))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        params[str(path[0])] += math.prod(leaf.shape) * repeats.get(str(path[0]), 1)
    layers = {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, _LAYERS)
    }
    with use_kernels("reference"), _named(layers):
        program = jax.make_jaxpr(lambda x: model(x))(jnp.zeros((1, *input_shape)))
    for (scope, is_convolution), flops in _count(program.jaxpr, "", count_padding=True).items():
        innermost = next((name for name in reversed(scope.split("/")) if name in layers), None)
        if innermost is not None:
            part = innermost.partition(".")[0]
            macs[part] += flops // 2 * repeats.get(part, 1)
            kinds[_kind(layers[innermost], is_convolution)] += flops // 2 * repeats.get(part, 1)
    parts = {part: Part(params[part], macs[part]) for part in dict.fromkeys((*macs, *params))}
    return Cost(params.total(), macs.total(), parts, dict(kinds))


def _kind(layer: nnx.Module, is_convolution: bool) -> str:
    if isinstance(layer, StructAttention):  # the linear layers inside have names of their own
        return "structure" if is_convolution else "attention"
    if isinstance(layer, DepthwiseConv):
        return "depthwise"
    layer = layer.fc1 if isinstance(layer, Mlp) else layer
    return "conv" if isinstance(layer, (Conv, Pointwise)) else "linear"


@contextlib.contextmanager
def _named(layers: Mapping[str, nnx.Module]) -> Iterator[None]:
    """Name the operations of these layers after them in traced programs."""
    names = {id(layer): name for name, layer in layers.items()}

    def name_scope(call: Callable) -> Callable:
        @functools.wraps(call)
        def named(layer: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            scope = jax.named_scope(names[id(layer)]) if id(layer) in names else contextlib.nullcontext()
            with scope:
                return call(layer, *args, **kwargs)

        return named

    with contextlib.ExitStack() as stack:
        for layer in _LAYERS:
            stack.enter_context(mock.patch.object(layer, "__call__", name_scope(layer.__call__)))
        yield


def count_flops(program: ClosedJaxpr) -> int:
    """Count the operations (two per multiply-accumulate) of a program from `jax.make_jaxpr` or `.trace`.

    A loop counts once per step, and what is recomputed for the backward pass counts again. A Pallas kernel
    counts by its cost estimate if it has one. Of `lax.cond` the largest branch counts, of
    `lax.platform_dependent` the default: that is the definition, fast implementations may compute more.
    Products with zeros from padding or dilation are not counted.

    Raises:
      NotImplementedError: a loop of unknown length with products in it.
    """
    return _count(program.jaxpr, "", count_padding=False).total()


class _Key(NamedTuple):
    scope: str  # name stack, as "stage1/mixer"
    is_convolution: bool  # or a matrix product


_Flops = collections.Counter[_Key]


def _count(jaxpr: Jaxpr, scope: str, count_padding: bool) -> _Flops:
    flops = _Flops()
    for equation in jaxpr.eqns:
        flops.update(_count_equation(equation, f"{scope}/{equation.source_info.name_stack}", count_padding))
    return flops


def _count_equation(equation: JaxprEqn, scope: str, count_padding: bool) -> _Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(_array(equation.invars[0]).shape[axis] for axis in contracted)
        return _Flops({_Key(scope, False): 2 * _array(equation.outvars[0]).size * depth})
    if name == "conv_general_dilated":
        return _Flops({_Key(scope, True): _convolution_flops(equation, count_padding)})
    target = params.get("target_name", name)
    if target.startswith(("dot_product_attention", "structvit_attention")):  # cuDNN's, and the one in C++
        query, key = map(_array, equation.invars[:2])  # [batch, length, ...]
        products = 5 if target.endswith("backward") or "bwd" in target else 2
        return _Flops({_Key(scope, False): products * 2 * query.size * key.shape[1]})
    if target.startswith("structvit_depthwise"):
        return _Flops({_Key(scope, True): _depthwise_flops(equation, target)})
    if name == "cond":
        branches, platforms = params["branches"], params.get("branches_platforms") or ()
        if None in platforms:
            branches = [branches[platforms.index(None)]]
        counts = [_count(branch.jaxpr, scope, count_padding) for branch in branches]
        return max(counts, key=_Flops.total)
    if name == "while":
        if _count(params["body_jaxpr"].jaxpr, scope, count_padding).total():
            raise NotImplementedError(f"a loop of unknown length with products in it, at {scope!r}")
        return _Flops()
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return _Flops({_Key(scope, False): int(params["cost_estimate"].flops)})
    steps = {"scan": lambda: params["length"], "pallas_call": lambda: math.prod(params["grid_mapping"].grid)}
    repeats = steps.get(name, lambda: 1)()
    # Only the program itself: rules for its differentiation are not run here.
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    if inner is None:
        return _Flops()
    flops = _count(getattr(inner, "jaxpr", inner), scope, count_padding)
    return _Flops({key: repeats * count for key, count in flops.items()})


def _depthwise_flops(equation: JaxprEqn, target: str) -> int:
    """Count a depthwise convolution in C++, or one of its gradients, without products with zeros."""
    shapes = [_array(operand).shape for operand in (*equation.invars, *equation.outvars)]
    if target.endswith("forward"):
        x, kernel = shapes[:2]
    elif target.endswith("of_input"):
        kernel, x = shapes[1:]
    else:
        x, _, kernel = shapes
    stride = dict(equation.params["attributes"])["stride"]
    *window, channels, planes = kernel
    pairs = 1  # of outputs and window taps
    for axis, (size, taps) in enumerate(zip(x[1:-1], window, strict=True)):
        step = stride if axis >= len(window) - 2 else 1
        positions = np.arange(0, size, step)[:, None] + np.arange(taps) - (taps - 1) // 2
        pairs *= int(((positions >= 0) & (positions < size)).sum())
    return 2 * x[0] * pairs * channels * planes


def _array(operand: Var | Literal) -> jax.core.ShapedArray:
    assert isinstance(operand.aval, jax.core.ShapedArray)
    return operand.aval


def _convolution_flops(equation: JaxprEqn, count_padding: bool) -> int:
    inputs, kernel, output = map(_array, (*equation.invars, *equation.outvars))
    params = equation.params
    layout = params["dimension_numbers"]
    pairs = 1  # of outputs and window taps
    for axis, (source, window, target) in enumerate(
        zip(layout.lhs_spec[2:], layout.rhs_spec[2:], layout.out_spec[2:], strict=True)
    ):
        positions = (  # in the dilated input, [outputs, taps]
            np.arange(output.shape[target])[:, None] * params["window_strides"][axis]
            + np.arange(kernel.shape[window])[None, :] * params["rhs_dilation"][axis]
            - params["padding"][axis][0]
        )
        dilation = params["lhs_dilation"][axis]
        last = (inputs.shape[source] - 1) * dilation
        is_input = (positions >= 0) & (positions <= last) & (positions % dilation == 0)
        pairs *= positions.size if count_padding else int(is_input.sum())
    inputs_per_group = kernel.shape[layout.rhs_spec[1]]
    return 2 * pairs * inputs_per_group * output.shape[layout.out_spec[0]] * output.shape[layout.out_spec[1]]
