"""Open the checkpoint that a path names, also while its run is training and replaces it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from etils import epath

from structvit_jax.runtime.digests import find_damage
from structvit_jax.runtime.storage import io_errors_as_user_error, read_card
from structvit_jax.training.checkpoint import Checkpoints
from structvit_jax.training.commit import FOLDER, is_step, steps_in
from structvit_jax.utils.errors import EXIT_RESUMABLE, UserError
from structvit_jax.utils.paths import parse_path

P = ParamSpec("P")
T = TypeVar("T")
_ATTEMPTS = 30  # to read a checkpoint before its run replaces it
_REMOVAL = 5.0  # seconds that removing one may take


def _locate(path: str) -> tuple[epath.Path, int | None]:
    """Splits "RUN/checkpoints/STEP" into (RUN, STEP); of "RUN" alone the step is None, the latest."""
    folder = parse_path(path)
    if is_step(folder) and folder.parent.name == FOLDER:
        return folder.parent.parent, int(folder.name)
    return folder, None


class _ReplacedError(UserError):
    """A run that is training has removed the checkpoint while it was read."""

    exit_code = EXIT_RESUMABLE


def rereading(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that opens a checkpoint: call it again when a run replaces that meanwhile.

    A run that is training removes its older checkpoints. A function that is given the run and not one of its
    steps then reads the next.
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
    """The checkpoints of a run, and the step that "RUN/checkpoints/STEP" names, of "RUN" its latest.

    Raises:
      UserError: there is none, it is not finished, or it is damaged. See `rereading` for running runs.
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
            " config.checkpoint.keep, or try again when it has ended"
        ) from error


def _is_removed(folder: epath.Path, before: list[int], named: int | None) -> bool:
    """Return whether a run removes the newest of the steps that were there before, or the named one."""
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
            " PyTorch weights (.pth, .safetensors) are for config.init_from, and for python -m"
            " structvit_jax.convert, which makes a checkpoint of them"
        )
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest() if named is None else named
        if step is None or not checkpoints.path(step).exists():
            kept = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"no finished checkpoint at {path}; {run} holds these steps: {kept}")
        if named is not None:
            checkpoints.check(step)
        yield checkpoints, step


def newest_card(workdir: epath.Path) -> dict[str, Any] | None:
    """Return the newest whole card in a workdir, if there is one. Every process may read it for itself."""
    for step in steps_in(workdir / FOLDER):
        folder = workdir / FOLDER / str(step)
        try:
            if not find_damage(folder, "card/"):
                return read_card(folder)
        except (UserError, FileNotFoundError):
            if folder.exists():  # otherwise a run that is training has removed it
                raise
    return None


@rereading
def open_card(path: str) -> dict[str, Any]:
    """Return the card of the checkpoint that a path names, see `open_checkpoint`."""
    with open_checkpoint(path) as (checkpoints, step):
        return checkpoints.card(step)
