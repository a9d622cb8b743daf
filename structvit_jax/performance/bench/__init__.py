"""Time a model against this machine's peak rates and against PyTorch: `structvit bench model`.

First the forward pass and the train step are timed; then each part of the model, once for the forward pass
and once with gradients. Every time is compared with two others: the time that its operations take at the
measured rate of matrix products, and the time that its bytes take at the measured rate of reading and writing
memory. For a part, both are lower bounds. For a whole model, the bytes are those that its program moves.

Because machines are noisy, calls that are compared alternate within one run, and medians are reported.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Mapping

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

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # difference of logits, relative to the largest logit


def run(
    config: ml_collections.ConfigDict,
    data: Dataset,
    workdir: epath.Path,
    *,
    only: str = "",
    rounds: int = 5,
    peer: str | None = None,
) -> None:
    """Time a model, print the results and write WORKDIR/bench.md, bench.json and bench.png.

    Args:
      config: configuration of the model.
      data: data set with the inputs of the model.
      workdir: folder for the results.
      only: patterns for the names of parts to time, such as "model" or "blocks1.*,*.attend"; "" selects all.
      rounds: number of measurements of the model and of each part.
      peer: "torch" also times extras/structvit_torch.py.

    Raises:
      UserError: there are several devices, a pattern matches nothing, the PyTorch file does not implement the
        model, or its logits differ.
    """
    if jax.device_count() > 1:
        raise UserError(f"structvit bench measures one device; JAX found {jax.device_count()}")
    learner = Learner.create(config, data)
    shape = (config.data.batch_size, *data.shape)
    parts = parts_of(learner.model, shape)
    names = ["model", *(part.name for part in parts)]
    complaint = f"--only: no part is named {{}}; the parts are {', '.join(names)}"
    wanted = matching(only or "*", names, complaint)
    torch_peer = TorchPeer(learner.model) if peer else None
    dtype = learner.model.variant.dtype
    rates = measure_rates(dtype, rounds)
    header = (
        f"{config.model.name}, batch {'x'.join(map(str, shape))}, {dtype};"
        f" {summary.machine(with_torch=bool(peer))}; {datetime.date.today()}. Peak rates of this machine:"
        f" {rates.operations / 1e9:.4g} G operations/s in matrix products, {rates.bytes / 1e9:.4g} GB/s of"
        f" memory (reads and writes). Medians of {rounds} rounds."
    )
    log(header)
    rows = []

    def add(row: Row) -> None:
        rows.append(row)
        log(summary.line(row, rates))

    if "model" in wanted:
        for row in _time_model(learner, data, shape, torch_peer, rounds):
            add(row)
    for part in parts:
        if part.name in wanted:
            for phase in PHASES:
                add(_time_part(part, phase, torch_peer, rounds))
    summary.write(rows, rates, header, workdir)
    plots = ", bench.png" * any(not row.samples for row in rows)
    log(f"wrote {workdir / 'bench.md'}, bench.json{plots}")


def _time_model(
    learner: Learner, data: Dataset, shape: tuple[int, ...], peer: TorchPeer | None, rounds: int
) -> Iterator[Row]:
    """Time the forward pass and the train step."""
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
        yield Row(
            name=config.model.name,
            phase=phase,
            ours=times.pop(""),
            operations=2 * macs * samples * (3 if phase == "train" else 1),
            bytes=program.moved,
            peers=times,
            samples=samples,
            memory=program.memory,
            compiling=program.compiling,
            first_call=program.first_call,
        )


def _time_part(part: Part, phase: str, peer: TorchPeer | None, rounds: int) -> Row:
    """Time a part of the model: its forward pass, or its forward pass with gradients."""
    is_train = phase == "train"
    arguments = [part.weights, part.inputs()]
    if is_train:
        arguments.append(jnp.ones(part.output.shape, part.output.dtype))
    compiled = jax.jit(part.gradients if is_train else part.forward).lower(*arguments).compile()
    peers = peer.part(part, backward=is_train) if peer else {}
    times = alternate({"": Call(functools.partial(compiled, *arguments)), **peers}, rounds)
    operations, moved = part.lower_bounds()[phase]
    return Row(part.name, phase, times.pop(""), operations, moved, times, part.calls_per_step)


def _check_logits(call: Call, peers: Mapping[str, Call], dtype: str) -> None:
    """Raise UserError if the logits of a variant of PyTorch differ by more than `_TOLERANCE`."""
    logits = np.asarray(call.run(), np.float32)
    for variant, peer in peers.items():
        others = peer.run().float().cpu().numpy()
        error = np.abs(logits - others).max() / np.abs(others).max()
        difference = f"logits differ from PyTorch ({variant}) by {error:.2g} of the largest logit"
        if not error < _TOLERANCE[dtype]:
            raise UserError(difference)
        log(difference)
