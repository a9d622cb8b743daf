"""Open a checkpoint by its path, even if its run is still training, and check that data fit it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

from etils import epath

from structvit_jax.data.types import Dataset
from structvit_jax.runtime import processes
from structvit_jax.runtime.digests import find_damage
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import io_errors_as_user_error
from structvit_jax.training.card import read_card
from structvit_jax.training.checkpoint import FOLDER, Checkpoints, is_step, steps_in
from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError
from structvit_jax.utils.paths import parse_path

P = ParamSpec("P")
T = TypeVar("T")
_ATTEMPTS = 30  # number of attempts to read a checkpoint that its run may remove meanwhile
_REMOVAL_SECONDS = 5.0  # that the removal of a checkpoint may take


class _ReplacedError(UserError):
    """The checkpoint was removed by its run, which is still training, while it was being read."""

    exit_code = EXIT_RESUMABLE


def rereading(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that opens a checkpoint: call it again if the run removes the checkpoint meanwhile.

    If the path names only the run and not a step, the next call reads a newer checkpoint.
    """

    @functools.wraps(function)
    def reread(*arguments: P.args, **options: P.kwargs) -> T:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(_ReplacedError):
                return function(*arguments, **options)
        return function(*arguments, **options)

    return reread


@contextlib.contextmanager
def open_checkpoint(path: str) -> Iterator[tuple[Checkpoints, int]]:
    """Open the checkpoints of a run, and select the step that a path names.

    Decorate callers with `rereading`, because the run may still be training.

    Args:
      path: "RUN/checkpoints/STEP", or "RUN" for its latest step.

    Raises:
      UserError: there is no checkpoint, or it is unfinished or damaged.
    """
    run, named = parse_path(path), None
    if is_step(run) and run.parent.name == FOLDER:
        run, named = run.parent.parent, int(run.name)
    folder = run / FOLDER
    with io_errors_as_user_error(run):
        if not folder.exists():
            raise UserError(
                f"no checkpoint at {path}: it should be RUN/checkpoints/STEP, or RUN for its latest. Files of"
                " PyTorch weights (.pth, .safetensors) are for config.init_from; `structvit convert` turns"
                " them into a checkpoint"
            )
        before = steps_in(folder)
    try:
        with Checkpoints(run) as checkpoints:
            step = checkpoints.latest() if named is None else named
            if step is None or not checkpoints.path(step).exists():
                kept = ", ".join(map(str, checkpoints.steps())) or "none"
                raise UserError(f"no finished checkpoint at {path}; {run} has these steps: {kept}")
            if named is not None:
                checkpoints.check(step)
            yield checkpoints, step
    except Exception as error:
        if not _is_removed(folder, before, named):
            raise
        raise _ReplacedError(
            f"the run in {run} replaces its checkpoints faster than they can be read; raise its"
            " config.checkpoint.keep, or try again after it has ended"
        ) from error


def _is_removed(folder: epath.Path, before: list[int], named: int | None) -> bool:
    """Return whether a run has removed the named step or, without one, the newest of the steps in `before`.

    Wait for a removal that is in progress.
    """
    step = named if named is not None else max(before, default=-1)
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while (steps := steps_in(folder)) != before and step in steps and time.monotonic() < deadline:
        time.sleep(0.05)
    return step in before and step not in steps


@rereading
def open_card(path: str) -> dict[str, Any]:
    """Return the card of a checkpoint; see `open_checkpoint` for the path."""
    with open_checkpoint(path) as (checkpoints, step):
        return checkpoints.card(step)


def newest_card(workdir: epath.Path) -> dict[str, Any] | None:
    """Return the newest undamaged card in a workdir, or None. A single process may call this alone."""
    for step in steps_in(workdir / FOLDER):
        folder = workdir / FOLDER / str(step)
        try:
            if not find_damage(folder, "card/"):
                return read_card(folder)
        except (UserError, FileNotFoundError):
            if folder.exists():  # otherwise the run, which is still training, has removed it
                raise
    return None


def adopt_classes(data: Dataset, card: Mapping[str, Any]) -> None:
    """Match the classes of the data by name with those of a checkpoint, and number the labels like these.

    Raises:
      UserError: the data have other classes, or the checkpoint does not name its classes.
    """
    if card["class_names"] is None:
        raise UserError(
            "the checkpoint does not name its classes, so its outputs cannot be matched to the data's labels;"
            " name them with structvit convert CHECKPOINT DESTINATION --labels=FILE, one name per line"
        )
    if data.adopt_classes(card["class_names"]):
        log("note: the classes of the data are in another order than the checkpoint's; matched by name")


def check_data(data: Dataset, card: Mapping[str, Any], path: epath.Path, *, is_complete: bool) -> None:
    """Compare the data of a run with the data that its checkpoint was trained on.

    An incomplete run may continue with changed data, for example after damaged files were replaced, if at
    least half of the sampled examples are the same.

    Args:
      data: the data of the run.
      card: the card of the checkpoint.
      path: the checkpoint, for error messages.
      is_complete: whether the checkpoint is the last of its run.

    Raises:
      UserError: the run is complete and the data differ, or more than half of the sampled examples differ.
    """
    if not card.get("data"):  # converted weights
        return
    changes = processes.broadcast_from_primary(lambda: data.changes_since(card["data"]))
    if changes.same:
        return
    if is_complete or 2 * changes.alike < changes.sampled:
        complete = ", and its run is complete" if is_complete else ""
        raise UserError(
            f"{path} was trained on other data ({changes.described}){complete}; choose another --workdir for"
            " the new data, or evaluate the checkpoint on them with `structvit evaluate`"
        )
    log(f"note: the data have changed ({changes.described})")


def same_test_data(data: Dataset, card: Mapping[str, Any]) -> bool:
    """Return whether the test data have the fingerprint in a card; True if the card has no fingerprint."""
    if not card.get("data"):  # converted weights
        return True
    changes = processes.broadcast_from_primary(lambda: data.changes_since(card["data"], test_only=True))
    return changes.same
