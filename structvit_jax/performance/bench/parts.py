"""Functions to time: the compiled forward pass and train step of a model, and each of its parts alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structvit_jax.data import Dataset
from structvit_jax.models import Network, StructAttention
from structvit_jax.models.blocks import Block, ConvMixer
from structvit_jax.models.weights import split
from structvit_jax.ops import convolve_structure, use_kernels
from structvit_jax.ops.attention import attention
from structvit_jax.performance import traffic
from structvit_jax.performance.bench.timing import Call
from structvit_jax.performance.cost import count_flops
from structvit_jax.runtime.mesh import put_batch
from structvit_jax.training.learner import Learner, memory_of, trace_train_step
from structvit_jax.utils.errors import UserError

_Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and its cost on one device."""

    call: Call
    compiling: float  # seconds
    first_call: float  # seconds; on a GPU the first call can take as long as compilation
    memory: float  # bytes of arguments, results and temporaries
    moved: float  # bytes read from and written to memory; 0 if `traffic.count` cannot read the program


def forward_program(learner: Learner, inputs: jax.Array) -> Program:
    """Compile the forward pass on normalised inputs, in evaluation mode."""
    structure, weights = split(learner.model)
    traced = jax.jit(lambda weights, x: structure.model(weights)(x)).trace(weights, inputs)
    return _compile(traced, lambda compiled: lambda: compiled(weights, inputs))


def train_program(learner: Learner, data: Dataset) -> Program:
    """Compile the train step of `structvit train`. All its calls use the same batch."""

    def make_run(compiled: jax.stages.Compiled) -> Callable[[], Any]:
        rows = learner.config.data.batch_size
        batch = put_batch(learner.mesh, next(iter(data.train_batches(rows, start_step=0))))
        state = learner.init_state(split(learner.model)[1])

        def run() -> Any:
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics

        return run

    return _compile(trace_train_step(learner, learner.abstract_state()), make_run)


def _compile(
    traced: jax.stages.Traced, make_run: Callable[[jax.stages.Compiled], Callable[[], Any]]
) -> Program:
    begin = time.perf_counter()
    compiled = traced.lower().compile()
    compiling = time.perf_counter() - begin
    try:
        moved = traffic.count(compiled.as_text()).hbm
    except UserError:
        moved = 0.0
    call = Call(make_run(compiled))
    begin = time.perf_counter()
    call.wait(call.run())
    first_call = time.perf_counter() - begin
    return Program(call, compiling, first_call, memory_of(compiled), moved)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model in training mode, as a function."""

    name: str  # such as "blocks3.mixer"
    calls_per_step: int  # how often the model calls it, with inputs of the same shapes, in one step
    function: Callable[..., jax.Array]  # (weights, *inputs) -> output
    weights: Any  # a pytree of arrays
    shapes: Sequence[_Shape]  # of the inputs
    dtype: str
    inner: bool = False  # whether it is contained in another part

    def inputs(self) -> list[jax.Array]:
        """Return random inputs."""
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype) for shape in self.shapes]

    def forward(self, weights: Any, inputs: list[jax.Array]) -> jax.Array:
        return self.function(weights, *inputs)

    def gradients(self, weights: Any, inputs: list[jax.Array], cotangent: jax.Array) -> Any:
        """Return the output, and the gradients with respect to weights and inputs."""
        output, pullback = jax.vjp(self.forward, weights, inputs)
        return output, pullback(cotangent)

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.forward, self.weights, self._abstract_inputs())

    def lower_bounds(self) -> dict[str, tuple[float, float]]:
        """Return lower bounds of the operations and bytes of "forward" and "train" (forward and backward).

        The backward pass is assumed to take twice the operations of the forward pass. Inputs, weights and
        outputs are assumed to be read or written once per pass, and intermediate arrays never.
        """
        inputs = self._abstract_inputs()
        with use_kernels("reference"):
            operations = count_flops(jax.make_jaxpr(self.forward)(self.weights, inputs))
        read = sum(map(_nbytes, (*jax.tree.leaves(self.weights), *inputs)))
        written = _nbytes(self.output)
        # The backward pass reads weights, inputs and the gradient of the output. It writes the gradients of
        # weights and inputs.
        return {
            "forward": (operations, read + written),
            "train": (3 * operations, 3 * read + 2 * written),
        }

    def _abstract_inputs(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in self.shapes]


def _nbytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def parts_of(model: Network, shape: _Shape) -> list[Part]:
    """Return the parts of a model for inputs [batch, *grid, 3].

    The parts are the patch embeddings, and one block per stage, split into position embedding ("position"),
    mixer and MLP. Inner parts are the depthwise convolutions ("depthwise"), the convolution of keys with the
    structure kernels ("patterns") and attention ("attend"). The convolution of values costs the same as that
    of keys, so "patterns" counts as two calls per block.
    """
    dtype = model.variant.dtype
    maps = jax.eval_shape(model.features, jax.ShapeDtypeStruct(shape, jnp.float32))
    stages = ("1", "2", "3", "4") if model.variant.network == "uniformer" else ("",)
    shapes = [shape, *(x.shape for x in maps)]
    parts = []
    for stage, (before, after) in zip(stages, itertools.pairwise(shapes), strict=False):
        name = f"patch_embed{stage}"
        parts.append(Part(name, 1, *_training_function(getattr(model, name)), [before], dtype))
        parts += _block_parts(f"blocks{stage}", getattr(model, f"blocks{stage}"), after, dtype)
    return parts


def _block_parts(name: str, blocks: Sequence[Block], shape: _Shape, dtype: str) -> Iterator[Part]:
    block, times = blocks[0], len(blocks)

    def part(suffix: str, module: nnx.Module, method: str = "__call__", inner: bool = False) -> Part:
        return Part(f"{name}.{suffix}", times, *_training_function(module, method), [shape], dtype, inner)

    if block.pos_embed is not None:
        yield part("position", block, "add_position")
        yield part("position.depthwise", block.pos_embed, inner=True)
    yield part("mixer", block, "add_mixer")
    if isinstance(block.attn, ConvMixer):
        yield part("mixer.depthwise", block.attn.depthwise, inner=True)
    elif isinstance(block.attn, StructAttention):
        yield from _attention_parts(f"{name}.mixer", block.attn, shape, dtype, times)
    yield part("mlp", block, "add_mlp")


def _attention_parts(
    name: str, layer: StructAttention, shape: _Shape, dtype: str, times: int
) -> Iterator[Part]:
    batch, *grid, width = shape
    heads = (layer.heads, width // layer.heads)
    keys = query = (batch, math.prod(grid), *heads)
    if layer.key_kernels is not None:

        def convolve(kernels: jax.Array, x: jax.Array) -> jax.Array:
            return convolve_structure(x, kernels.astype(x.dtype), stride=layer.stride)

        kernels, shapes = layer.key_kernels[...], [(batch, *grid, *heads)]
        part = Part(f"{name}.patterns", 2 * times, convolve, kernels, shapes, dtype, inner=True)
        yield part
        keys = (batch, math.prod(part.output.shape[1:-2]), *heads)
    shapes = [query, keys, keys]
    yield Part(f"{name}.attend", times, lambda _, *qkv: attention(*qkv), (), shapes, dtype, inner=True)


def _training_function(
    module: nnx.Module, method: str = "__call__"
) -> tuple[Callable[..., jax.Array], nnx.State]:
    """Return a function of weights and input that calls a method of a module, and the weights.

    The module is in training mode.
    """
    module.train()
    graphdef, *(weights, stats) = nnx.split(module, nnx.Param, nnx.BatchStat)
    module.eval()

    def function(weights: nnx.State, x: jax.Array) -> jax.Array:
        return getattr(nnx.merge(graphdef, weights, stats, copy=True), method)(x)

    return function, weights
