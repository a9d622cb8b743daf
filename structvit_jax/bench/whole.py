"""Forward pass and train step of a configured model, compiled and ready to be timed."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax

from structvit_jax import traffic
from structvit_jax.bench.timing import Call
from structvit_jax.errors import UserError
from structvit_jax.models.weights import split
from structvit_jax.training.mesh import put_batch
from structvit_jax.training.program import memory_of, trace_train_step
from structvit_jax.training.run import Run, abstract_state
from structvit_jax.training.step import init_state


@dataclasses.dataclass(frozen=True)
class Program:
    """Something compiled, and what it takes on one device."""

    call: Call
    compiling: float  # seconds
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
    return Program(Call(start(compiled)), seconds, memory_of(compiled), moved)
