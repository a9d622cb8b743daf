"""UserError, exit codes and did-you-mean suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

EXIT_USER_ERROR = 2  # the user must first change the command line, a file or the environment
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: re-running the same command resumes
EXIT_INTERRUPTED = 130  # Ctrl-C; shells use the same code


class UserError(ValueError):
    """An error that the user can fix; the message is one line and says how."""

    exit_code = EXIT_USER_ERROR


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run, and its state is saved; the message is one line."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ' Did you mean ...?' with the most similar choices, or ' Known: ...' if none is similar."""
    choices = sorted(choices)
    if near := difflib.get_close_matches(name, choices, n=3, cutoff=0.6):
        return f" Did you mean {' or '.join(map(repr, near))}?"
    return f" Known: {', '.join(choices)}."


def unknown_choice(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a name that is not one of `choices`.

    Args:
      kind: the word for what is chosen, such as "model".
      name: the unknown name.
      choices: the known names.
    """
    return UserError(f"unknown {kind} {name!r}.{did_you_mean(name, choices)}")


def check_choice(kind: str, name: str, choices: Collection[str]) -> str:
    """Return `name`; raise the error of `unknown_choice` if it is not one of `choices`."""
    if name not in choices:
        raise unknown_choice(kind, name, choices)
    return name
