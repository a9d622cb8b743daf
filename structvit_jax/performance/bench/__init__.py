"""How fast a configuration runs, against what this machine could do and against PyTorch: `--mode=bench`.

The forward pass and the train step are timed, and then the parts that the model is made of, each forward
alone and with its gradients. All are held against two floors: operations at the rate that matrix products
reach here, and bytes at the rate of copies. What is compared takes turns within one run, and medians are
told, since machines are noisy.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from structvit_jax.config import matching, model_arguments
from structvit_jax.models import cost
from structvit_jax.performance.bench import report
from structvit_jax.performance.bench.parts import Part, forward_program, parts_of, train_program
from structvit_jax.performance.bench.peer import TorchPeer
from structvit_jax.performance.bench.report import Row
from structvit_jax.performance.bench.timing import Call, alternate, measure_rates
from structvit_jax.runtime.processes import log
from structvit_jax.training.learner import Learner
from structvit_jax.utils.errors import UserError

PHASES = ("forward", "train")
_AGREE = {"float32": 1e-3, "bfloat16": 0.1}  # logits and the peer's, relative to the largest


class Request(NamedTuple):
    """What to time."""

    only: str = ""  # patterns of names, as "model" or "blocks1.*,*.attend"; "" is all
    rounds: int = 5  # measurements of each part, of which the median counts
    peer: str | None = None  # "torch" compares with extras/structvit_torch.py


def run(config: ml_collections.ConfigDict, data: Any, workdir: epath.Path, request: Request) -> None:
    """Prints and writes WORKDIR/bench.md, bench.png and, with every turn, bench.json.

    Args:
      config, data, workdir: as for `train`.
      request: what is timed, how often, and against what.

    Raises:
      UserError: several devices, nothing with a name as in request.only, a model that PyTorch's file
        does not have, or logits that differ from PyTorch's.
    """
    if jax.device_count() > 1:
        raise UserError(f"structvit bench measures one device; there are {jax.device_count()} here")
    learner = Learner.create(config, data)
    shape = (config.data.batch_size, *data.shape)
    parts = list(parts_of(learner.model, shape))
    names = ["model", *(part.name for part in parts)]
    complaint = f"--only: nothing is named {{}}; there are {', '.join(names)}"
    wanted = matching(request.only or "*", names, complaint)
    parts = [part for part in parts if part.name in wanted]
    other = TorchPeer(learner.model) if request.peer else None
    dtype = learner.model.variant.dtype
    rates = measure_rates(dtype, request.rounds)
    header = (
        f"{config.model.name}, batch {'x'.join(map(str, shape))}, {dtype};"
        f" {report.machine(bool(request.peer))}; {datetime.date.today()}. Here matrix products reach"
        f" {rates.operations / 1e9:.4g} G operations/s"
        f" and copies {rates.bytes / 1e9:.4g} GB/s. Medians of {request.rounds} turns."
    )
    log(header)
    rows = []
    for row in _rows(learner, data, parts, "model" in wanted, shape, other, request.rounds):
        rows.append(row)
        log(report.tell(row, rates))
    report.write(rows, rates, header, workdir)
    log(f"{workdir / 'bench.md'}, bench.json" + ", bench.png" * any(not row.samples for row in rows))


def _rows(
    learner: Learner,
    data: Any,
    parts: list[Part],
    whole: bool,
    shape: tuple[int, ...],
    other: TorchPeer | None,
    rounds: int,
) -> Iterator[Row]:
    if whole:
        yield from _whole(learner, data, shape, other, rounds)
    for part in parts:
        for phase in PHASES:
            yield _part(part, phase, other, rounds)


def _whole(
    learner: Learner, data: Any, shape: tuple[int, ...], other: TorchPeer | None, rounds: int
) -> Iterator[Row]:
    """The model's forward pass and its train step."""
    config, samples = learner.config, shape[0]
    arguments = model_arguments(config)
    macs = cost(arguments.pop("name"), shape[1:], len(data.class_names), **arguments).macs
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    for phase in PHASES:
        program = forward_program(learner, inputs) if phase == "forward" else train_program(learner, data)
        calls = getattr(other, phase)(inputs) if other else {}
        if phase == "forward":
            _compare(program.call, calls, learner.model.variant.dtype)
        times = alternate({"": program.call, **calls}, rounds)
        operations = 2 * macs * samples * (3 if phase == "train" else 1)
        yield Row(
            config.model.name, phase, times.pop(""), operations, program.moved, times,
            samples=samples, memory=program.memory, compiling=program.compiling,
            first=program.first,
        )  # fmt: skip


def _compare(ours: Call, peers: dict[str, Call], dtype: str) -> None:
    """Raises UserError where a variant of the peer gives other logits than ours."""
    logits = np.asarray(ours.run(), np.float32)
    for variant, call in peers.items():
        theirs = call.run().float().cpu().numpy()
        apart = np.abs(logits - theirs).max() / np.abs(theirs).max()
        if not apart < _AGREE[dtype]:
            raise UserError(f"PyTorch ({variant}) gives other logits: {apart:.2g} of the largest apart")
        log(f"logits and PyTorch's ({variant}): {apart:.1e} of the largest apart")


def _part(part: Part, phase: str, other: TorchPeer | None, rounds: int) -> Row:
    function: Any = part.forward
    arguments: tuple[Any, ...] = (part.weights, part.inputs())
    if phase == "train":
        function, output = part.gradients, part.output
        arguments = (*arguments, jnp.ones(output.shape, output.dtype))
    compiled = jax.jit(function).lower(*arguments).compile()
    calls = {"": Call(lambda: compiled(*arguments))}
    if other:
        calls |= other.part(part, backward=phase == "train")
    times = alternate(calls, rounds)
    operations, moved = part.least()[phase]
    return Row(part.name, phase, times.pop(""), operations, moved, times, times=part.times)
