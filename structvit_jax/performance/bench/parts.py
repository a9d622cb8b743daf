"""What is timed: forward pass and train step as they are compiled, and the parts of a model, each as a
function of its own, with the least that it must compute and move."""

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

from structvit_jax.models import Network
from structvit_jax.models.blocks import Block, ConvMixer
from structvit_jax.models.weights import split
from structvit_jax.ops import convolve_structure
from structvit_jax.ops.attention import attention
from structvit_jax.performance import traffic
from structvit_jax.performance.bench.timing import Call
from structvit_jax.performance.operations import operations
from structvit_jax.runtime.mesh import put_batch
from structvit_jax.training.compilation import memory_of, trace_train_step
from structvit_jax.training.run import Run, abstract_state
from structvit_jax.training.step import init_state
from structvit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Program:
    """Something compiled, and what it takes on one device."""

    call: Call
    compiling: float  # seconds
    first: float  # seconds of its first call, which on a GPU can take as long again
    memory: float  # bytes: arguments, results and temporaries
    moved: float  # bytes from and to memory; 0 where the counter cannot read the program


def forward_program(run: Run, inputs: jax.Array) -> Program:
    """Logits of normalised inputs, in evaluation mode."""
    structure, weights = split(run.model)
    traced = jax.jit(lambda weights, x: structure.model(weights)(x)).trace(weights, inputs)
    return _compile(traced, lambda compiled: lambda: compiled(weights, inputs))


def train_program(run: Run) -> Program:
    """The train step as `--mode=train` takes it, on one batch again and again."""

    def start(compiled):
        rows = run.config.data.batch_size
        batch = put_batch(run.mesh, next(iter(run.data.train_batches(rows, start_step=0))))
        state = init_state(split(run.model)[1], run.optimizer, run.mesh, averaged=run.averages)

        def step():
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics

        return step

    return _compile(trace_train_step(run, abstract_state(run)), start)


def _compile(traced: Any, start: Any) -> Program:
    begin = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    try:
        moved = traffic.count(compiled.as_text(), unknown=1).hbm
    except UserError:
        moved = 0.0
    call = Call(start(compiled))
    begin = time.perf_counter()
    call.wait(call.run())
    return Program(call, seconds, time.perf_counter() - begin, memory_of(compiled), moved)


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that a model in training does `times` times, each time on the same shapes."""

    name: str  # as "blocks3.mixer"
    times: int
    function: Callable  # (weights, *inputs) -> output
    weights: Any
    shapes: Sequence[Shape]  # of the inputs
    dtype: str
    inner: bool  # whether it lies inside another part

    def inputs(self) -> list[jax.Array]:
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype) for shape in self.shapes]

    def forward(self, weights: Any, inputs: list[jax.Array]) -> jax.Array:
        return self.function(weights, *inputs)

    def gradients(self, weights: Any, inputs: list[jax.Array], cotangent: jax.Array) -> Any:
        """The output, and the gradients of weights and inputs."""
        output, pull = jax.vjp(self.forward, weights, inputs)
        return output, pull(cotangent)

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.forward, self.weights, self._abstract())

    def least(self) -> dict[str, tuple[float, float]]:
        """Operations and bytes, by "forward" and by "train", which is forward and backward. Products count
        once, with gradients three times; arrays that come in or go out count once, those between not."""
        computed = operations(jax.make_jaxpr(self.forward)(self.weights, self._abstract()))
        given = sum(_size(x) for x in (*jax.tree.leaves(self.weights), *self._abstract()))
        made = _size(self.output)
        # backward: read weights, inputs and a cotangent like the output, write gradients of the first two
        return {"forward": (computed, given + made), "train": (3 * computed, 3 * given + 2 * made)}

    def _abstract(self):
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in self.shapes]


def _size(x):
    return math.prod(x.shape) * x.dtype.itemsize


def parts_of(model: Network, shape: Shape) -> Iterator[Part]:
    """The embeddings and rows of equal blocks of a model, for inputs of this shape, [batch, *grid, 3]."""
    maps = jax.eval_shape(model.features, jax.ShapeDtypeStruct(shape, jnp.float32))
    rows = ("1", "2", "3", "4") if model.variant.network == "uniformer" else ("",)
    shapes = [shape, *(x.shape for x in maps)]
    for row, (before, after) in zip(rows, itertools.pairwise(shapes), strict=False):
        embed, blocks = getattr(model, f"patch_embed{row}"), getattr(model, f"blocks{row}")
        yield _of(embed, f"patch_embed{row}", type(embed).__call__, before, model.variant.dtype)
        yield from _of_blocks(f"blocks{row}", blocks, after, model.variant.dtype)


def _of_blocks(row: str, blocks: Any, shape: Shape, dtype: str) -> Iterator[Part]:
    """Position, mixer and mlp of equal blocks; and, from inside the mixer, depthwise convolution, the
    patterns of keys (those of values are alike) and attention."""
    block, times = blocks[0], len(blocks)
    if block.pos_embed is not None:
        yield _of(block, f"{row}.position", Block.add_position, shape, dtype, times)
        yield _of(block.pos_embed, f"{row}.position.depthwise", _call, shape, dtype, times, inner=True)
    yield _of(block, f"{row}.mixer", Block.add_mixer, shape, dtype, times)
    if isinstance(block.attn, ConvMixer):
        yield _of(block.attn.depthwise, f"{row}.mixer.depthwise", _call, shape, dtype, times, inner=True)
    else:
        yield from _of_attention(f"{row}.mixer", block.attn, shape, dtype, times)
    yield _of(block, f"{row}.mlp", Block.add_mlp, shape, dtype, times)


def _of_attention(row: str, layer: Any, shape: Shape, dtype: str, times: int) -> Iterator[Part]:
    batch, *grid, width = shape
    heads = (layer.heads, width // layer.heads)
    keys = query = (batch, math.prod(grid), *heads)
    if layer.key_kernels is not None:

        def convolve(kernels, x):
            return convolve_structure(x, kernels.astype(x.dtype), stride=layer.stride)

        kernels = layer.key_kernels[...]
        shapes = [(batch, *grid, *heads)]
        part = Part(f"{row}.patterns", 2 * times, convolve, kernels, shapes, dtype, inner=True)
        yield part
        keys = (batch, math.prod(part.output.shape[1:-2]), *heads)
    yield Part(f"{row}.attend", times, lambda _, *qkv: attention(*qkv), (), [query, keys, keys], dtype, True)


def _call(layer, x):
    return layer(x)


def _of(
    module: nnx.Module, name: str, method: Callable, shape: Shape, dtype: str, times: int = 1, inner=False
) -> Part:
    """A method of a module in training mode, on an input of this shape."""
    module.train()
    graphdef, *(weights, rest) = nnx.split(module, nnx.Param, nnx.BatchStat)
    module.eval()

    def function(weights, x):
        return method(nnx.merge(graphdef, weights, rest, copy=True), x)

    return Part(name, times, function, weights, [shape], dtype, inner)
