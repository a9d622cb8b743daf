"""Checkpoints of a run: Orbax directories `checkpoints/STEP/` with weights, optimizer state and a card.

The card is JSON and describes the weights: class names, configuration, code version. Every file has a digest,
which is written before the save is committed and compared before anything is restored. A checkpoint without
digests is unfinished, one whose files differ from them is damaged, and the newest undamaged one is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from structvit_jax.models.weights import Weights, mismatches
from structvit_jax.runtime import processes
from structvit_jax.runtime.digests import find_damage
from structvit_jax.runtime.lock import live_owner
from structvit_jax.runtime.mesh import abstract, replicated
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import unusable_error, write
from structvit_jax.training.card import read_card
from structvit_jax.training.commit import FOLDER, InBucket, OnDisk, entries, is_unfinished, steps_in
from structvit_jax.training.step import TrainState
from structvit_jax.utils.errors import Stopped, UserError
from structvit_jax.utils.paths import absolute, is_bucket

DAMAGED = "damaged"  # folder for damaged checkpoints
_WEIGHTS, _OPTIMIZER, _AVERAGE = "weights", "optimizer", "average"  # items, as in TrainState
_METRIC = "top1"  # ranks the best checkpoints
# Of a replicated array, every device writes a part if parts have at least so many bytes. Each part needs
# its own program, and compiling some hundred of them delayed the first save of a run. (Orbax then stores no
# shapes of the parts, which are not needed to restore them.)
_LEAST_PART = 2**20


class RetentionPolicy(NamedTuple):
    """Which checkpoints are kept."""

    latest: int  # how many of the latest
    best: int = 0  # how many of those with the highest top1, of the evaluated ones
    every: int = 0  # all at multiples of so many steps; 0 is none


class Checkpoints:
    """The checkpoints of one workdir; a context that waits at its end for saves in progress.

    Orbax's process-wide settings are changed within the context and restored at its end.
    """

    def __init__(self, workdir: epath.PathLike, keep: RetentionPolicy | None = None):
        """Open the checkpoints of a workdir.

        Args:
          workdir: of the run.
          keep: opens them for writing, too.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        self._folder = epath.Path(workdir) / FOLDER
        self._writes = keep is not None
        with contextlib.ExitStack() as settings:
            settings.enter_context(_orbax_settings(writes=self._writes))
            options = ocp.CheckpointManagerOptions(create=False, read_only=True)
            if keep:
                processes.broadcast_from_primary(self._remove_unfinished)
                self.latest()  # sets damaged checkpoints aside before Orbax reads the folder
                options = ocp.CheckpointManagerOptions(
                    preservation_policy=_policy(keep),
                    best_fn=_rank,
                    temporary_path_class=InBucket if is_bucket(self._folder) else OnDisk,
                )
            self._manager = ocp.CheckpointManager(absolute(self._folder), options=options)
            self._settings = settings.pop_all()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        done = kind is None or issubclass(kind, Stopped)
        with self._settings, self._saving() if done else contextlib.suppress(Exception):
            self._manager.close()

    def latest(self) -> int | None:
        """Return the newest step that was undamaged at the first call; all processes must call it.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        return self._newest_whole

    def steps(self) -> list[int]:
        """Return all finished steps, newest first; they may be damaged."""
        return steps_in(self._folder)

    def path(self, step: int) -> epath.Path:
        """Return the folder of a step."""
        return self._folder / str(step)

    def save(
        self, state: TrainState, card: Mapping[str, Any], scores: Mapping[str, float] | None = None
    ) -> None:
        """Save a state in the background, as its step.

        Args:
          state: weights, optimizer state and average; parts that are None are left out.
          card: see `structvit_jax.training.card.make_card`.
          scores: of the evaluation after this step, which rank the checkpoint.

        Raises:
          UserError: it cannot be written. This may also be raised by the next save or at the context's end.
        """
        items = {"weights": ocp.args.StandardSave(state.weights), "card": ocp.args.JsonSave(card)}
        for name in (_OPTIMIZER, _AVERAGE):
            if getattr(state, name) is not None:
                items[name] = ocp.args.StandardSave(getattr(state, name))
        with self._saving():
            self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=scores)

    def card(self, step: int) -> dict[str, Any]:
        """Read the card of a step, see `structvit_jax.training.card.make_card`."""
        return read_card(self.path(step))

    def weights(
        self, step: int, like: Weights, mesh: Mesh, advice: str, *, averaged: bool = False
    ) -> Weights:
        """Restore the weights of a step onto a mesh, whatever mesh they were saved from.

        Args:
          step: of the checkpoint.
          like: weights of the model, for names, shapes and dtypes.
          mesh: on which the weights are placed.
          advice: end of the error message for another model.
          averaged: restore the moving average instead, if there is one.

        Raises:
          UserError: they cannot be read, or are of another model.
        """
        self._check_fit(step, like, advice)
        item = _AVERAGE if averaged and self.has(step, _AVERAGE) else _WEIGHTS
        return self._restore(step, **{item: ocp.args.StandardRestore(abstract(like, mesh))})[item]

    def state(self, step: int, like: TrainState, mesh: Mesh, advice: str) -> TrainState:
        """Restore the whole state of a resumable step; arguments and errors as for `weights`."""
        weights = self.weights(step, like.weights, mesh, advice)
        optimizer = ocp.args.StandardRestore(abstract(like.optimizer, mesh))
        optimizer = self._restore(step, optimizer=optimizer)[_OPTIMIZER]
        average = None
        if like.average is not None:  # starts at the weights if none was saved
            average = self.weights(step, like.average, mesh, advice, averaged=True)
        step_ = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        return TrainState(step_, weights, optimizer, average)

    def check_resumable(self, step: int) -> None:
        """Raise UserError if a step holds weights only, like converted checkpoints."""
        if not self.has(step, _OPTIMIZER):
            raise UserError(
                f"{self.path(step)} holds weights only, without the optimizer state that resuming needs;"
                f" start from them with --config.init_from={self.path(step)} and another --workdir"
            )

    def whole(self, step: int, mesh: Mesh) -> tuple[dict[str, np.ndarray], bool]:
        """Return all arrays of the weights of a step as they were saved, in every process.

        Returns:
          The moving average if there is one, or else the weights; and whether it is the moving average.
        """
        averaged = self.has(step, _AVERAGE)
        item = _AVERAGE if averaged else _WEIGHTS
        shapes = jax.tree.map(
            lambda saved: jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=replicated(mesh)),
            self._saved(step, item),
        )
        restored = self._restore(step, **{item: ocp.args.StandardRestore(shapes)})[item]
        return jax.tree.map(np.asarray, restored["params"] | restored["batch_stats"]), averaged

    def classes(self, step: int) -> int:
        """Return the number of classes of a step's model."""
        return self._saved(step, _WEIGHTS)["params"]["head.bias"].shape[0]

    def has(self, step: int, item: str) -> bool:
        """Return whether a checkpoint has an item: "optimizer" or "average"."""
        return (self.path(step) / item).exists()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turn whatever Orbax and its stores raise when they cannot write into one line."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # caused by another process
            raise
        except Exception as error:
            text = str(error)
            if known := re.findall(r"[^:]+: ([^:\[]+) \[os_error_code=", text):
                text = known[-1]
            raise unusable_error(self._folder, text, self._folder.parent, error) from error

    def check(self, step: int) -> None:
        """Raise UserError if the files of a step are damaged."""
        if reason := processes.broadcast_from_primary(functools.partial(find_damage, self.path(step))):
            raise UserError(f"{self.path(step)} is damaged: {reason}")

    def _remove_unfinished(self) -> None:
        """Remove saves that a kill interrupted."""
        for path in entries(self._folder):
            if is_unfinished(path):
                path.rmtree()

    @functools.cached_property
    def _newest_whole(self) -> int | None:
        """The newest undamaged step. Sets damaged ones aside if the checkpoints are open for writing."""
        damaged: dict[int, str] = {}
        newest = None
        for step in processes.broadcast_from_primary(self.steps):
            if newest is not None and not self._writes:
                break
            # Orbax reads the scores of older steps, to rank them.
            part = "" if newest is None else "metrics/"
            if reason := processes.broadcast_from_primary(
                functools.partial(find_damage, self.path(step), part)
            ):
                damaged[step] = reason
            elif newest is None:
                newest = step
        if newest is not None:
            for step, reason in damaged.items():
                moved = functools.partial(self._set_aside, step, reason)
                where = processes.broadcast_from_primary(moved) if self._writes else ""
                log(f"warning: {self.path(step)} is damaged ({reason}); step {newest} is used{where}")
            return newest
        if damaged:
            step = max(damaged)
            raise UserError(
                f"{self.path(step)} is damaged ({damaged[step]}), and so are all other checkpoints in"
                f" {self._folder}; {self._advice('move them away to start again')}"
            )
        return None

    def _set_aside(self, step: int, reason: str) -> str:
        folder = self._folder.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        path = next(p for i in range(10**6) if not (p := folder / f"{step}{f'.{i}' * bool(i)}").exists())
        write(folder / f"{path.name}.txt", reason + "\n")  # creates the folder in a bucket
        self.path(step).rename(path)
        return f", it is set aside as {path}"

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        advice = self._advice("move it away to use an older one")
        return UserError(f"checkpoint {self.path(step)} cannot be read ({reason}); {advice}")

    def _advice(self, otherwise: str) -> str:
        """Return advice on a checkpoint that cannot be used: to wait if a run is writing there."""
        run = self._folder.parent
        owner = "" if self._writes else live_owner(run)
        return (
            f"{run} is being written by a run ({owner}); try again after its next save"
            if owner
            else otherwise
        )

    def _saved(self, step: int, item: str) -> dict[str, dict[str, Any]]:
        """Return metadata with the shapes and dtypes of saved weights."""
        try:
            saved = ocp.StandardCheckpointer().metadata(absolute(self.path(step) / item)).item_metadata
            return {"params": dict(saved["params"]), "batch_stats": dict(saved["batch_stats"])}
        except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable(step, error) from error

    def _check_fit(self, step: int, like: Weights, advice: str) -> None:
        saved = self._saved(step, _WEIGHTS)
        problems = mismatches(like.params | like.batch_stats, saved["params"] | saved["batch_stats"])
        if problems:
            card = self.card(step)
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {self.path(step)} holds another model than the configured one:"
                f" {card['config']['model']['name']} with {self.classes(step)} classes"
                f" ({', '.join(problems[:3])}{more}); {advice}"
            )


@contextlib.contextmanager
def _orbax_settings(*, writes: bool) -> Iterator[None]:
    """Hide Orbax's log, since failures are raised as well, and set how it writes arrays."""

    def is_wanted(record: logging.LogRecord) -> bool:  # each context adds and removes a filter of its own
        return "/orbax/" not in record.pathname

    handlers = ocp.type_handlers
    logger, previous = logging.getLogger("absl"), handlers.get_type_handler(jax.Array)
    logger.addFilter(is_wanted)
    try:
        if writes:
            arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
            handlers.register_type_handler(jax.Array, arrays, override=True)
        yield
    finally:
        if writes:
            handlers.register_type_handler(jax.Array, previous, override=True)
        logger.removeFilter(is_wanted)


def _rank(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _policy(keep: RetentionPolicy) -> checkpoint_managers.PreservationPolicy:
    policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep.latest)]
    if keep.every:
        policies.append(checkpoint_managers.EveryNSteps(keep.every))
    if keep.best:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=_rank, n=keep.best, keep_checkpoints_without_metrics=False
            )
        )
    return checkpoint_managers.AnyPreservationPolicy(policies)
