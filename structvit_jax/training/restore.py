"""Open a checkpoint by its path, even while its run is training and replaces it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from etils import epath

from structvit_jax.runtime.digests import find_damage
from structvit_jax.runtime.storage import io_errors_as_user_error
from structvit_jax.training.card import read_card
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.commit import FOLDER, is_step, steps_in
from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError
from structvit_jax.utils.paths import parse_path

P = ParamSpec("P")
T = TypeVar("T")
_ATTEMPTS = 30  # at reading a checkpoint before its run replaces it
_REMOVAL = 5.0  # seconds that the removal of a checkpoint may take


def _locate(path: str) -> tuple[epath.Path, int | None]:
    """Split "RUN/checkpoints/STEP" into (RUN, STEP); for "RUN" alone the step is None, the latest."""
    folder = parse_path(path)
    if is_step(folder) and folder.parent.name == FOLDER:
        return folder.parent.parent, int(folder.name)
    return folder, None


class _ReplacedError(UserError):
    """A run in training removed the checkpoint while it was read."""

    exit_code = EXIT_RESUMABLE


def rereading(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that opens a checkpoint: repeat it if a run in training removes the checkpoint.

    If the path names the run and no step, the function then reads the next checkpoint.
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

    Decorate callers with `rereading`, in case the run is still training.

    Args:
      path: "RUN/checkpoints/STEP", or "RUN" for its latest step.

    Raises:
      UserError: no checkpoint, or an unfinished or damaged one.
    """
    run, named = _locate(path)
    with io_errors_as_user_error(run):
        before = steps_in(run / FOLDER)
    try:
        with _open(path, run, named) as opened:
            yield opened
    except Exception as error:
        if not _is_removed(run / FOLDER, before, named):
            raise
        raise _ReplacedError(
            f"the run in {run} replaces its checkpoints faster than they can be read; raise its"
            " config.checkpoint.keep, or try again after it has ended"
        ) from error


def _is_removed(folder: epath.Path, before: list[int], named: int | None) -> bool:
    """Return whether a run removed the named step, or the newest of the earlier ones."""
    step = named if named is not None else max(before, default=-1)
    deadline = time.monotonic() + _REMOVAL
    while (steps := steps_in(folder)) != before and step in steps and time.monotonic() < deadline:
        time.sleep(0.05)
    return step in before and step not in steps


@contextlib.contextmanager
def _open(path: str, run: epath.Path, named: int | None) -> Iterator[tuple[Checkpoints, int]]:
    with io_errors_as_user_error(run):
        exists = (run / FOLDER).exists()
    if not exists:
        raise UserError(
            f"no checkpoint at {path}: it should be RUN/checkpoints/STEP, or RUN for its latest. Files of"
            " PyTorch weights (.pth, .safetensors) are for config.init_from; `structvit convert` turns them"
            " into a checkpoint"
        )
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest() if named is None else named
        if step is None or not checkpoints.path(step).exists():
            kept = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"no finished checkpoint at {path}; {run} has these steps: {kept}")
        if named is not None:
            checkpoints.check(step)
        yield checkpoints, step


def newest_card(workdir: epath.Path) -> dict[str, Any] | None:
    """Return the newest undamaged card in a workdir, if there is one. Processes need not call it together."""
    for step in steps_in(workdir / FOLDER):
        folder = workdir / FOLDER / str(step)
        try:
            if not find_damage(folder, "card/"):
                return read_card(folder)
        except (UserError, FileNotFoundError):
            if folder.exists():  # or a run in training has removed it
                raise
    return None


@rereading
def open_card(path: str) -> dict[str, Any]:
    """Return the card of a checkpoint; see `open_checkpoint` for the path."""
    with open_checkpoint(path) as (checkpoints, step):
        return checkpoints.card(step)
