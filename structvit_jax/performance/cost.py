"""Count the parameters of a model, and the arithmetic of models and traced programs.

Only the matrix products and convolutions in the jaxpr of a program are counted. Normalisation, softmax, GELU
and biases are not counted; they would add less than 0.5 %.

Programs must be traced with `use_kernels("reference")`: kernels replace convolutions by sums or custom calls
that cannot be recognised, and recompute some products.
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
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from structvit_jax.models.layers import Conv, DepthwiseConv, Linear, Mlp, Pointwise
from structvit_jax.models.networks import create_model
from structvit_jax.models.struct_attention import StructAttention
from structvit_jax.models.variants import get_variant
from structvit_jax.ops import use_kernels

_LAYERS = (StructAttention, Mlp, Linear, Conv, DepthwiseConv)  # these contain all products of a model


@dataclasses.dataclass(frozen=True)
class Part:
    """Cost of one part of a model."""

    params: int  # trainable parameters
    macs: int  # multiply-accumulates for one example


@dataclasses.dataclass(frozen=True)
class Cost(Part):
    """Cost of a whole model."""

    parts: dict[str, Part]  # by top-level module, in the order of the forward pass
    kinds: dict[str, int]  # multiply-accumulates, by kind: conv, depthwise, linear, structure, attention


def cost(name: str, input_shape: Sequence[int], num_classes: int, **overrides: Any) -> Cost:
    """Count the parameters of a model, and its multiply-accumulates for one example.

    As is usual in papers, products with the zero padding of convolutions are counted. Resizing the position
    embeddings of a DeiT is not counted.

    Args:
      name: name of the model, as for `create_model`.
      input_shape: [height, width, 3] or [time, height, width, 3].
      num_classes: number of classes.
      **overrides: settings of the model, as for `create_model`.

    Raises:
      UserError: an unknown name or override, or an input shape that the model does not accept.
    """
    depths = get_variant(name, **overrides).depths
    # All blocks of a stage cost the same, so trace one block per stage.
    overrides |= {"depths": tuple(min(depth, 1) for depth in depths), "remat": "none"}
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
    for scope, is_convolution, flops in _products(program.jaxpr, count_padding=True):
        innermost = next((name for name in reversed(scope.split("/")) if name in layers), None)
        if innermost is not None:
            part = innermost.partition(".")[0]
            macs[part] += flops // 2 * repeats.get(part, 1)
            kinds[_kind(layers[innermost], is_convolution)] += flops // 2 * repeats.get(part, 1)
    parts = {part: Part(params[part], macs[part]) for part in dict.fromkeys((*macs, *params))}
    return Cost(params.total(), macs.total(), parts, dict(kinds))


def _kind(layer: nnx.Module, is_convolution: bool) -> str:
    """Return the kind of a product in a layer, a key of `Cost.kinds`."""
    if isinstance(layer, StructAttention):  # without its linear layers, which are in `_LAYERS` themselves
        return "structure" if is_convolution else "attention"
    if isinstance(layer, DepthwiseConv):
        return "depthwise"
    layer = layer.fc1 if isinstance(layer, Mlp) else layer
    return "conv" if isinstance(layer, (Conv, Pointwise)) else "linear"


@contextlib.contextmanager
def _named(layers: Mapping[str, nnx.Module]) -> Iterator[None]:
    """Inside this context, trace each layer in a name scope with its name."""
    names = {id(layer): name for name, layer in layers.items()}

    def add_scope(call: Callable) -> Callable:
        @functools.wraps(call)
        def call_in_scope(layer: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            scope = jax.named_scope(names[id(layer)]) if id(layer) in names else contextlib.nullcontext()
            with scope:
                return call(layer, *args, **kwargs)

        return call_in_scope

    with contextlib.ExitStack() as stack:
        for layer in _LAYERS:
            stack.enter_context(mock.patch.object(layer, "__call__", add_scope(layer.__call__)))
        yield


def count_flops(program: ClosedJaxpr) -> int:
    """Count the floating-point operations of a program, two per multiply-accumulate.

    Products with zeros from padding or dilation are not counted. The body of a scan is counted once per step,
    and products that `jax.checkpoint` recomputes are counted again. For `lax.cond`, only the branch with the
    most operations is counted.

    Args:
      program: the jaxpr from `jax.make_jaxpr` or `.trace`, traced with `use_kernels("reference")`.

    Raises:
      NotImplementedError: a loop of unknown length contains products.
    """
    return sum(product.flops for product in _products(program.jaxpr, count_padding=False))


class _Product(NamedTuple):
    scope: str  # name stack, such as "stage1/mixer"
    is_convolution: bool  # otherwise it is a matrix product
    flops: int


def _products(
    jaxpr: Jaxpr, *, count_padding: bool, outer_scope: str = "", repeats: int = 1
) -> Iterator[_Product]:
    """Yield the matrix products and convolutions of a jaxpr that runs `repeats` times."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        scope = f"{outer_scope}/{equation.source_info.name_stack}"
        within = functools.partial(_products, count_padding=count_padding, outer_scope=scope, repeats=repeats)
        if name == "dot_general":
            yield _Product(scope, False, repeats * _matmul_flops(equation))
        elif name == "conv_general_dilated":
            yield _Product(scope, True, repeats * _convolution_flops(equation, count_padding))
        elif name == "cond":
            branches = [list(within(branch.jaxpr)) for branch in params["branches"]]
            yield from max(branches, key=lambda products: sum(product.flops for product in products))
        elif name == "while":
            if any(within(params["body_jaxpr"].jaxpr)):
                raise NotImplementedError(f"a loop of unknown length contains products, at {scope!r}")
        elif name == "scan":
            yield from within(params["jaxpr"].jaxpr, repeats=repeats * params["length"])
        else:  # perhaps a call, such as jit or custom_vjp
            inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
            if inner is not None:
                yield from within(getattr(inner, "jaxpr", inner))


def _shapes(equation: JaxprEqn) -> list[tuple[int, ...]]:
    """Return the shapes of the operands and of the result."""
    return [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]  # type: ignore[attr-defined]


def _matmul_flops(equation: JaxprEqn) -> int:
    left, _, result = _shapes(equation)
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation: JaxprEqn, count_padding: bool) -> int:
    inputs, kernel, output = _shapes(equation)
    params = equation.params
    layout = params["dimension_numbers"]
    pairs = 1  # number of pairs of an output position and a window tap
    for axis, (input_axis, kernel_axis, output_axis) in enumerate(
        zip(layout.lhs_spec[2:], layout.rhs_spec[2:], layout.out_spec[2:], strict=True)
    ):
        positions = (  # in the dilated input without padding, [outputs, taps]
            np.arange(output[output_axis])[:, None] * params["window_strides"][axis]
            + np.arange(kernel[kernel_axis]) * params["rhs_dilation"][axis]
            - params["padding"][axis][0]
        )
        dilation = params["lhs_dilation"][axis]
        last = (inputs[input_axis] - 1) * dilation
        is_input = (positions >= 0) & (positions <= last) & (positions % dilation == 0)
        pairs *= positions.size if count_padding else int(is_input.sum())
    batch, channels = (output[axis] for axis in layout.out_spec[:2])
    inputs_per_group = kernel[layout.rhs_spec[1]]
    return 2 * pairs * inputs_per_group * batch * channels
