"""Checkpoints of a run: Orbax directories `checkpoints/STEP/` with weights, optimizer state and a card.

The card is JSON and says what the weights are: class names, configuration, code version. Every file has a
digest, written before the save is committed and compared before anything is restored: a checkpoint without
digests was not finished, one whose files differ is damaged, and the newest one that is whole is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Iterator
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
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.sharding import abstract, replicated
from structvit_jax.runtime.storage import read_card, unusable_error, write
from structvit_jax.training.commit import FOLDER, InBucket, OnDisk, entries, is_unfinished, steps_in
from structvit_jax.training.step import TrainState
from structvit_jax.utils.errors import Stopped, UserError
from structvit_jax.utils.paths import absolute, is_bucket

ASIDE = "damaged"  # where checkpoints that cannot be used are put
_WEIGHTS, _OPTIMIZER, _AVERAGE = (
    "weights",
    "optimizer",
    "average",
)  # parts of a checkpoint, as of a TrainState
_METRIC = "top1"  # what the best checkpoints are best in
# Of an array that is the same on all devices, each writes a part, if parts are this large: each is made by a
# program of its own, and compiling some hundred of them held up the first save of a run. (Orbax's notes of
# the parts' shapes are left out then; restoring does without them.)
_LEAST_PART = 2**20


class RetentionPolicy(NamedTuple):
    """Which checkpoints stay."""

    latest: int
    best: int = 0  # of those that were evaluated, by top1
    every: int = 0  # steps whose multiples stay; 0 is none


class Checkpoints:
    """The checkpoints below one folder. As a context, leaving it waits for the saves under way.

    Raises:
      UserError: there are checkpoints, and all are damaged.
    """

    def __init__(self, workdir: epath.PathLike, keep: RetentionPolicy | None = None):
        """`keep` opens them for writing too."""
        logging.getLogger("absl").addFilter(_drop_orbax_warnings)
        self._folder = epath.Path(workdir) / FOLDER
        self._writes = keep is not None
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        if keep:
            processes.broadcast_from_primary(self._remove_unfinished)
            sys.unraisablehook = _leave_out_closed_loops
            self.latest()  # what is damaged is out of the way before Orbax looks
            arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
            ocp.type_handlers.register_type_handler(jax.Array, arrays, override=True)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_policy(keep),
                best_fn=_rank,
                temporary_path_class=InBucket if is_bucket(self._folder) else OnDisk,
            )
        self._manager = ocp.CheckpointManager(absolute(self._folder), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        done = kind is None or issubclass(kind, Stopped)
        with self._saving() if done else contextlib.suppress(Exception):
            self._manager.close()

    def latest(self) -> int | None:
        """The newest step that was whole when this was first asked; all processes have to ask.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        return self._newest_whole

    def steps(self) -> list[int]:
        """All steps whose save was finished, newest first; they may be damaged."""
        return steps_in(self._folder)

    def path(self, step: int) -> epath.Path:
        """The folder of a step."""
        return self._folder / str(step)

    def save(self, state: TrainState, card: dict[str, Any], scores: dict[str, float] | None = None) -> None:
        """Saves in the background, under the state's step, with the scores of its evaluation."""
        items = {"weights": ocp.args.StandardSave(state.weights), "card": ocp.args.JsonSave(card)}
        for name in (_OPTIMIZER, _AVERAGE):
            if getattr(state, name) is not None:
                items[name] = ocp.args.StandardSave(getattr(state, name))
        with self._saving():
            self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=scores)

    def card(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step says of itself, see `Run.card`."""
        return read_card(self.path(step))

    def weights(
        self, step: int, like: Weights, mesh: Mesh, advice: str, *, averaged: bool = False
    ) -> Weights:
        """The weights of a step, placed on the mesh, whatever mesh they were saved from.

        Args:
          averaged: their moving average instead, if there is one.

        Raises:
          UserError: they cannot be read, or do not fit `like`: names what differs, and gives `advice`.
        """
        self._check_fit(step, like, advice)
        item = _AVERAGE if averaged and self.has(step, _AVERAGE) else _WEIGHTS
        return self._restore(step, **{item: ocp.args.StandardRestore(abstract(like, mesh))})[item]

    def state(self, step: int, like: TrainState, mesh: Mesh, advice: str) -> TrainState:
        """The whole state after a step that is resumable; errors as for `weights`."""
        weights = self.weights(step, like.weights, mesh, advice)
        optimizer = ocp.args.StandardRestore(abstract(like.optimizer, mesh))
        optimizer = self._restore(step, optimizer=optimizer)[_OPTIMIZER]
        average = None
        if like.average is not None:  # which starts at the weights where there was none
            average = self.weights(step, like.average, mesh, advice, averaged=True)
        step_ = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        return TrainState(step_, weights, optimizer, average)

    def check_resumable(self, step: int) -> None:
        """Raise UserError if a step holds weights alone, as converted ones do."""
        if not self.has(step, _OPTIMIZER):
            raise UserError(
                f"{self.path(step)} holds weights alone, with no state of an optimizer to resume;"
                f" start from them with --config.init_from={self.path(step)} and another --workdir"
            )

    def whole(self, step: int, mesh: Mesh) -> tuple[dict[str, np.ndarray], bool]:
        """All arrays of the weights of a step as they were saved, in every process, and whether they are the
        moving average, which is taken where there is one."""
        averaged = self.has(step, _AVERAGE)
        item = _AVERAGE if averaged else _WEIGHTS
        shapes = jax.tree.map(
            lambda saved: jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=replicated(mesh)),
            self._saved(step, item),
        )
        restored = self._restore(step, **{item: ocp.args.StandardRestore(shapes)})[item]
        return jax.tree.map(np.asarray, restored["params"] | restored["batch_stats"]), averaged

    def classes(self, step: int) -> int:
        """How many classes the model of a step tells apart."""
        return self._saved(step, _WEIGHTS)["params"]["head.bias"].shape[0]

    def has(self, step: int, item: str) -> bool:
        """Whether a checkpoint has a part: "optimizer", "average"."""
        return (self.path(step) / item).exists()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """One line for whatever Orbax and its stores raise when they cannot write."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of another process's making
            raise
        except Exception as error:
            text = str(error)
            if known := re.findall(r"[^:]+: ([^:\[]+) \[os_error_code=", text):
                text = known[-1]
            raise unusable_error(self._folder, text, self._folder.parent, error) from error

    def check(self, step: int) -> None:
        """Raises UserError if a step's files are not what was saved."""
        if reason := processes.broadcast_from_primary(functools.partial(find_damage, self.path(step))):
            raise UserError(f"{self.path(step)} is damaged: {reason}")

    def _remove_unfinished(self) -> None:
        """Removes what kills left of saves."""
        for path in entries(self._folder):
            if is_unfinished(path):
                path.rmtree()

    @functools.cached_property
    def _newest_whole(self) -> int | None:
        """The newest step without damage; puts the damaged ones out of the way, if it may."""
        damaged: dict[int, str] = {}
        newest = None
        for step in processes.broadcast_from_primary(self.steps):
            if newest is not None and not self._writes:
                break
            # Of older ones Orbax reads the scores, to tell the best.
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
                f"{self.path(step)} is damaged ({damaged[step]}), and no other checkpoint in {self._folder}"
                f" is whole; {self._advice('move them away to start again')}"
            )
        return None

    def _set_aside(self, step: int, reason: str) -> str:
        folder = self._folder.parent / ASIDE
        folder.mkdir(exist_ok=True)
        place = next(p for i in range(10**6) if not (p := folder / f"{step}{f'.{i}' * bool(i)}").exists())
        write(folder / f"{place.name}.txt", reason + "\n")  # without an object a bucket has no such folder
        self.path(step).rename(place)
        return f", it is set aside as {place}"

    def _restore(self, step, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step, reason):
        reason = " ".join(str(reason).split())[:300]
        advice = self._advice("move it away to use an older one")
        return UserError(f"checkpoint {self.path(step)} cannot be read ({reason}); {advice}")

    def _advice(self, otherwise: str) -> str:
        """What to do about a checkpoint: nothing to it while a run is writing there."""
        run = self._folder.parent
        owner = "" if self._writes else live_owner(run)
        return (
            f"{run} is being written by a run ({owner}); try again when it has saved" if owner else otherwise
        )

    def _saved(self, step, item):
        """Shapes and types of the weights that were saved."""
        try:
            saved = ocp.StandardCheckpointer().metadata(absolute(self.path(step) / item)).item_metadata
            return {"params": dict(saved["params"]), "batch_stats": dict(saved["batch_stats"])}
        except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable(step, error) from error

    def _check_fit(self, step, like, advice):
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


def _drop_orbax_warnings(record: logging.LogRecord) -> bool:
    """Keep Orbax's notes on its own options out of the caller's output; errors pass, and other packages."""
    return record.levelno >= logging.ERROR or "/orbax/" not in record.pathname


def _leave_out_closed_loops(unraisable: Any) -> None:
    """When Orbax gives up a save, every write that is still under way would print a traceback."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _rank(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _policy(keep: RetentionPolicy):
    policies = [checkpoint_managers.LatestN(keep.latest)]
    if keep.every:
        policies.append(checkpoint_managers.EveryNSteps(keep.every))
    if keep.best:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=_rank,
                n=keep.best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return checkpoint_managers.AnyPreservationPolicy(policies)
