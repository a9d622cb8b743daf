"""Checkpoints of a run: Orbax directories `checkpoints/STEP/` with weights, optimizer state and a card.

The card is JSON and describes the weights: class names, configuration, code version. Every file has a digest.
On a disk, a save has a temporary name until all digests are written; in a bucket, its digest file is empty
until then. The digests are compared before anything is restored. If they differ, the checkpoint is damaged.
The newest undamaged checkpoint is used.
"""

from __future__ import annotations

import asyncio
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
from orbax.checkpoint.path import atomicity

from structvit_jax.models.weights import Weights, mismatches
from structvit_jax.runtime.digests import FILE, find_damage, write_digests
from structvit_jax.runtime.lock import live_owner
from structvit_jax.runtime.mesh import abstract, replicated
from structvit_jax.runtime.processes import broadcast_from_primary, log
from structvit_jax.runtime.storage import read_json, unusable_error, write, write_json
from structvit_jax.training.card import read_card
from structvit_jax.training.step import TrainState
from structvit_jax.utils.errors import Stopped, UserError
from structvit_jax.utils.paths import absolute, is_bucket

FOLDER, DAMAGED = "checkpoints", "damaged"  # folders in a workdir
_WEIGHTS, _OPTIMIZER, _AVERAGE = "weights", "optimizer", "average"  # Orbax items, named as in TrainState
# Every device writes a part of a replicated array if the parts have at least this many bytes. Each part needs
# its own compiled program, and compiling hundreds of programs would delay the first save of a run.
_MIN_PART_BYTES = 2**20


class RetentionPolicy(NamedTuple):
    """Which checkpoints are kept."""

    latest: int  # number of latest checkpoints
    best: int = 0  # number of evaluated checkpoints with the highest top1
    every: int = 0  # keep all multiples of this many steps; 0 is none


class Checkpoints:
    """The checkpoints of one workdir. Use it as a context, which waits for saves in progress on exit.

    Process-wide settings of Orbax are changed within the context and restored on exit.
    """

    def __init__(self, workdir: epath.PathLike, keep: RetentionPolicy | None = None):
        """Open the checkpoints of a workdir.

        Args:
          workdir: the folder of the run.
          keep: which checkpoints to keep, for a run that writes; None opens the checkpoints for reading only.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        self._folder = epath.Path(workdir) / FOLDER
        self._writes = keep is not None
        with contextlib.ExitStack() as settings:
            settings.enter_context(_orbax_settings(writes=self._writes))
            options = ocp.CheckpointManagerOptions(create=False, read_only=True)
            if keep:
                broadcast_from_primary(self._remove_unfinished)
                self.latest()  # sets damaged checkpoints aside before Orbax reads the folder
                options = ocp.CheckpointManagerOptions(
                    preservation_policy=_policy(keep),
                    best_fn=_rank,
                    temporary_path_class=_InBucket if is_bucket(self._folder) else _OnDisk,
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
        return self._newest_undamaged

    def steps(self) -> list[int]:
        """Return all finished steps, newest first; they may be damaged."""
        return steps_in(self._folder)

    def path(self, step: int) -> epath.Path:
        """Return the folder of a step."""
        return self._folder / str(step)

    def save(
        self, state: TrainState, card: Mapping[str, Any], scores: Mapping[str, object] | None = None
    ) -> None:
        """Save a state in the background, under the number of its step.

        Args:
          state: weights, optimizer state and average; parts that are None are not saved.
          card: see `structvit_jax.training.card.make_card`.
          scores: scores of the evaluation after this step, if there was one; their top1 ranks the checkpoint.

        Raises:
          UserError: it cannot be written. The next save or the exit of the context may also raise this.
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
          step: the checkpoint.
          like: weights of the model, for names, shapes and dtypes.
          mesh: the devices to place the weights on.
          advice: how to fix it, for the error message if the checkpoint holds another model.
          averaged: restore the moving average of the weights instead, if there is one.

        Raises:
          UserError: the weights cannot be read, or belong to another model.
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
        if like.average is not None:  # if none was saved, the average starts as a copy of the weights
            average = self.weights(step, like.average, mesh, advice, averaged=True)
        step_ = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        return TrainState(step_, weights, optimizer, average)

    def whole(self, step: int, mesh: Mesh) -> tuple[dict[str, np.ndarray], bool]:
        """Return the complete arrays of a step's weights, as they were saved, in every process.

        Returns:
          The moving average of the weights if there is one, else the weights; and whether it is the average.
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

    def check(self, step: int) -> None:
        """Raise UserError if the files of a step are damaged."""
        if reason := self._damage(step):
            raise UserError(f"{self.path(step)} is damaged: {reason}")

    def _damage(self, step: int, part: str = "") -> str:
        return broadcast_from_primary(lambda: find_damage(self.path(step), part))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turn any exception that Orbax or its storage raises on writing into a UserError of one line."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # caused by another process
            raise
        except Exception as error:
            text = str(error)
            if reasons := re.findall(r"[^:]+: ([^:\[]+) \[os_error_code=", text):
                text = reasons[-1]
            raise unusable_error(self._folder, text, self._folder.parent, error) from error

    def _remove_unfinished(self) -> None:
        """Remove saves that a kill interrupted."""
        for path in _entries(self._folder):
            if _is_unfinished(path):
                path.rmtree()

    @functools.cached_property
    def _newest_undamaged(self) -> int | None:
        """The newest undamaged step. Damaged steps are set aside if the checkpoints are open for writing."""
        damaged: dict[int, str] = {}
        newest = None
        for step in broadcast_from_primary(self.steps):
            if newest is not None and not self._writes:
                break
            # Of older steps Orbax reads only the scores, to rank them, so only these files are checked.
            if reason := self._damage(step, "" if newest is None else "metrics/"):
                damaged[step] = reason
            elif newest is None:
                newest = step
        if newest is None and damaged:
            step = max(damaged)
            raise UserError(
                f"{self.path(step)} is damaged ({damaged[step]}), and so are all other checkpoints in"
                f" {self._folder}; {self._advice('move them away to start again')}"
            )
        for step, reason in damaged.items():
            where = ""
            if self._writes:
                where = broadcast_from_primary(functools.partial(self._set_aside, step, reason))
                where = f"; moved to {where}"
            log(f"warning: {self.path(step)} is damaged ({reason}){where}; using step {newest}")
        return newest

    def _set_aside(self, step: int, reason: str) -> str:
        """Move a damaged step into another folder, and return its new path."""
        folder = self._folder.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        path = next(p for i in range(10**6) if not (p := folder / f"{step}{f'.{i}' * bool(i)}").exists())
        write(folder / f"{path.name}.txt", reason + "\n")  # creates the folder in a bucket
        self.path(step).rename(path)
        return str(path)

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
        """Return advice on a checkpoint that cannot be used: to try again later if a run is writing it."""
        run = self._folder.parent
        if not self._writes and (owner := live_owner(run)):
            return f"{run} is being written by a run ({owner}); try again after its next save"
        return otherwise

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
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {self.path(step)} holds another model than the configured one:"
                f" {self.card(step)['config']['model']['name']} with {self.classes(step)} classes"
                f" ({', '.join(problems[:3])}{more}); {advice}"
            )


@contextlib.contextmanager
def _orbax_settings(*, writes: bool) -> Iterator[None]:
    """Hide Orbax's log, since failures also raise exceptions, and set how Orbax writes arrays."""

    # Defined here so that each context adds and removes a filter of its own.
    def is_wanted(record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname

    handlers = ocp.type_handlers
    logger, previous = logging.getLogger("absl"), handlers.get_type_handler(jax.Array)
    logger.addFilter(is_wanted)
    try:
        if writes:
            arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_PART_BYTES)
            handlers.register_type_handler(jax.Array, arrays, override=True)
        yield
    finally:
        if writes:
            handlers.register_type_handler(jax.Array, previous, override=True)
        logger.removeFilter(is_wanted)


def _rank(metrics: dict[str, float]) -> float:
    return metrics["top1"]


def _policy(keep: RetentionPolicy) -> checkpoint_managers.PreservationPolicy:
    policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep.latest)]
    if keep.every:
        policies.append(checkpoint_managers.EveryNSteps(keep.every))
    if keep.best:
        best = {"get_metric_fn": _rank, "n": keep.best, "keep_checkpoints_without_metrics": False}
        policies.append(checkpoint_managers.BestN(**best))
    return checkpoint_managers.AnyPreservationPolicy(policies)


class _OnDisk(atomicity.AtomicRenameTemporaryPath):
    """A save on a disk: writes the digests between Orbax's last write and the rename that commits it."""

    async def finalize(self) -> None:
        final = self.get_final()
        if not _is_checkpoint(final):
            await super().finalize()
            return
        # This name is still a temporary one, so the folder is removed if a kill comes before the next rename.
        self._final_path = self._tmp_path.with_name(self._tmp_path.name + "-written")
        await super().finalize()
        await asyncio.to_thread(write_digests, self._final_path)
        await asyncio.to_thread(self._final_path.rename, final)
        self._final_path = final


class _InBucket(atomicity.CommitFileTemporaryPath):
    """A save in a bucket, which cannot rename: the digest file is empty until the save is finished."""

    async def create(self) -> epath.Path:
        path = await super().create()
        if _is_checkpoint(path):
            await asyncio.to_thread(write_json, path / FILE, {})
        return path

    async def finalize(self) -> None:
        await super().finalize()
        if _is_checkpoint(self.get_final()):
            await asyncio.to_thread(write_digests, self.get_final())


def _is_checkpoint(path: epath.Path) -> bool:
    """Return whether a path is the folder of a step, not the folder of one of its items."""
    return path.parent.name == FOLDER


def _is_unfinished(path: epath.Path) -> bool:
    """Return whether a save was not finished.

    On a disk, its name is temporary. In a bucket, its digest file is empty, or it has neither that file nor
    Orbax's commit file. A committed save without a valid digest file is damaged instead.
    """
    if not is_bucket(path):
        return atomicity.TMP_DIR_SUFFIX in path.name
    if (path / FILE).exists():
        return read_json(path / FILE) == {}
    return is_step(path) and not (path / atomicity.COMMIT_SUCCESS_FILE).exists()


def is_step(path: epath.Path) -> bool:
    """Return whether the name of a folder is a step, as written by `str`."""
    name = path.name
    return name.isascii() and name.isdecimal() and len(name) <= 18 and str(int(name)) == name


def _entries(folder: epath.Path) -> list[epath.Path]:
    """Return the content of a folder of checkpoints; [] if it does not exist."""
    try:
        return list(folder.iterdir()) if folder.exists() else []
    except NotADirectoryError as error:
        raise UserError(
            f"{folder} is a file, but a run stores its checkpoints there; move it away"
        ) from error


def steps_in(folder: epath.Path) -> list[int]:
    """Return the finished steps in a folder, newest first."""
    paths = [path for path in _entries(folder) if is_step(path) and not _is_unfinished(path)]
    return sorted((int(path.name) for path in paths), reverse=True)
