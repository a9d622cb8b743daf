"""Time a configuration against this machine's peak rates and against PyTorch: `structvit bench model`.

The forward pass and the train step are timed, then the parts of the model, each forward alone and with its
gradients. All are compared with two lower bounds: operations at the measured rate of matrix products, and
bytes at the measured rate of copies. Calls that are compared alternate within one run, and medians are
reported, since machines are noisy.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from structvit_jax.config import matching, model_arguments
from structvit_jax.data import Dataset
from structvit_jax.performance.bench import summary
from structvit_jax.performance.bench.parts import Part, forward_program, parts_of, train_program
from structvit_jax.performance.bench.peer import TorchPeer
from structvit_jax.performance.bench.summary import PHASES, Row
from structvit_jax.performance.bench.timing import Call, alternate, measure_rates
from structvit_jax.performance.cost import cost
from structvit_jax.runtime.processes import log
from structvit_jax.training.learner import Learner
from structvit_jax.utils.errors import UserError

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of logits to the peer's, relative to the largest


class Request(NamedTuple):
    """What to time."""

    only: str = ""  # patterns of names, as "model" or "blocks1.*,*.attend"; "" is all
    rounds: int = 5  # measurements of each part; their median is reported
    peer: str | None = None  # "torch" compares with extras/structvit_torch.py


def run(config: ml_collections.ConfigDict, data: Dataset, workdir: epath.Path, request: Request) -> None:
    """Time a configuration, print the results and write WORKDIR/bench.md, bench.png and bench.json.

    Raises:
      UserError: several devices, no part that matches `request.only`, a model that PyTorch's file does not
        have, or logits that differ from PyTorch's.
    """
    if jax.device_count() > 1:
        raise UserError(f"structvit bench measures one device; there are {jax.device_count()} here")
    learner = Learner.create(config, data)
    shape = (config.data.batch_size, *data.shape)
    parts = list(parts_of(learner.model, shape))
    names = ["model", *(part.name for part in parts)]
    complaint = f"--only: nothing is named {{}}; there are {', '.join(names)}"
    wanted = matching(request.only or "*", names, complaint)
    peer = TorchPeer(learner.model) if request.peer else None
    dtype = learner.model.variant.dtype
    rates = measure_rates(dtype, request.rounds)
    header = (
        f"{config.model.name}, batch {'x'.join(map(str, shape))}, {dtype};"
        f" {summary.machine(bool(request.peer))}; {datetime.date.today()}. Here matrix products reach"
        f" {rates.operations / 1e9:.4g} G operations/s"
        f" and copies {rates.bytes / 1e9:.4g} GB/s. Medians of {request.rounds} rounds."
    )
    log(header)
    rows = []
    wanted_parts = [part for part in parts if part.name in wanted]
    for row in _rows(learner, data, wanted_parts, "model" in wanted, shape, peer, request.rounds):
        rows.append(row)
        log(summary.line(row, rates))
    summary.write(rows, rates, header, workdir)
    log(f"{workdir / 'bench.md'}, bench.json" + ", bench.png" * any(not row.samples for row in rows))


def _rows(
    learner: Learner,
    data: Dataset,
    parts: Sequence[Part],
    with_model: bool,
    shape: tuple[int, ...],
    peer: TorchPeer | None,
    rounds: int,
) -> Iterator[Row]:
    """Time the forward pass and the train step of the model, if it is wanted, and then its parts."""
    if with_model:
        yield from _model_rows(learner, data, shape, peer, rounds)
    for part in parts:
        for phase in PHASES:
            function: Callable[..., Any] = part.forward
            arguments: tuple[Any, ...] = (part.weights, part.inputs())
            if phase == "train":
                function = part.gradients
                arguments = (*arguments, jnp.ones(part.output.shape, part.output.dtype))
            compiled = jax.jit(function).lower(*arguments).compile()
            calls = {"": Call(functools.partial(compiled, *arguments))}
            if peer:
                calls |= peer.part(part, backward=phase == "train")
            times = alternate(calls, rounds)
            operations, moved = part.lower_bounds()[phase]
            yield Row(part.name, phase, times.pop(""), operations, moved, times, times=part.times)


def _model_rows(
    learner: Learner, data: Dataset, shape: tuple[int, ...], peer: TorchPeer | None, rounds: int
) -> Iterator[Row]:
    config, samples = learner.config, shape[0]
    arguments = model_arguments(config)
    macs = cost(arguments.pop("name"), shape[1:], len(data.class_names), **arguments).macs
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    for phase in PHASES:
        program = forward_program(learner, inputs) if phase == "forward" else train_program(learner, data)
        peers = getattr(peer, phase)(inputs) if peer else {}
        if phase == "forward":
            _check_logits(program.call, peers, learner.model.variant.dtype)
        times = alternate({"": program.call, **peers}, rounds)
        operations = 2 * macs * samples * (3 if phase == "train" else 1)
        yield Row(
            config.model.name, phase, times.pop(""), operations, program.moved, times,
            samples=samples, memory=program.memory, compiling=program.compiling, first=program.first,
        )  # fmt: skip


def _check_logits(call: Call, peers: Mapping[str, Call], dtype: str) -> None:
    """Raise UserError if a variant of the peer gives other logits."""
    logits = np.asarray(call.run(), np.float32)
    for variant, peer in peers.items():
        others = peer.run().float().cpu().numpy()
        error = np.abs(logits - others).max() / np.abs(others).max()
        if not error < _TOLERANCE[dtype]:
            raise UserError(f"logits differ from PyTorch's ({variant}) by {error:.2g} of the largest")
        log(f"logits differ from PyTorch's ({variant}) by {error:.1e} of the largest")
