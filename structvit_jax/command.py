"""What is wrong with a command's flags, in one line that says what is near."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from structvit_jax.config import check_config, from_card
from structvit_jax.errors import UserError, did_you_mean, exit_in_one_line

_NO_CONFIGS = (
    " The configurations are in the repository, in configs/, and are not installed with the package: run this"
    " in a clone, or give the path of such a file with --config=PATH"
)


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """For reading flags, those of a configuration and --help among them.

    Raises:
      UserError: an unknown flag or key, or a value that it does not take.
    """
    app.define_help_flags()
    try:
        yield
    except (KeyError, AttributeError) as error:
        raise UserError(_unknown_key(str(error))) from error
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_last_line(error)) from error


def run_command(main: Callable[[list[str]], None]) -> None:
    """What a module does that is a command: a user's mistake is one line and its exit code."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs its whole life; what matters it raises
    with exit_in_one_line():
        main(sys.argv)


def config_path(argv: Sequence[str]) -> epath.Path:
    """The file that --config names, without an argument after ':'.

    Raises:
      UserError: none, or one that is not there.
    """
    path = _named_config(argv)
    if path.suffix != ".py" or not path.is_file():
        folder = path if path.is_dir() else path.parent
        known = [str(file) for file in folder.glob("*.py")] if folder.is_dir() else []
        hint = did_you_mean("" if path.is_dir() else str(path), known) if known else _NO_CONFIGS
        raise UserError(f"no configuration file (.py) at {str(path)!r}.{hint}")
    return path


def _named_config(argv: Sequence[str]) -> epath.Path:
    for position, word in enumerate(argv):
        if match := re.match("--?config=(.*)", word):
            return epath.Path(match[1].split(":")[0])
        if word in ("--config", "-config") and position + 1 < len(argv):
            return epath.Path(argv[position + 1].split(":")[0])
    raise UserError("say which configuration: --config=configs/moving_digits.py")


def checkpoint_config(argv: Sequence[str], *positional: str) -> list[Any]:
    """What a command that acts on a checkpoint is given: its positional arguments, the first of them the
    checkpoint, and the configuration of its card, with what flags change of it.

    Raises:
      UserError: other arguments, no checkpoint, or flags that do not fit.
    """
    given = _words(argv)
    if len(given) != len(positional):
        raise UserError(f"it takes {' '.join(positional)}, and flags as --config.data.root=DIR; see --help")
    return [*_of_card(argv, given[0])[:2], *given[1:]]


def checkpoint_and_paths(argv: Sequence[str], paths: str) -> tuple[str, Any, list[str]]:
    """The same for a command that acts on files: --checkpoint, the configuration, and the files' paths, of
    which there is one at least; `paths` is what they are called."""
    checkpoint = flags.DEFINE_string("checkpoint", None, "RUN/checkpoints/STEP, or RUN for its latest.")
    if _words(argv) and checkpoint.value:
        where, config, files = _of_card(argv, checkpoint.value)
        if files:
            return where, config, files
    raise UserError(f"it takes --checkpoint=RUN, {paths}, and flags as --config.data.size=N; see --help")


def _words(argv):
    """Positional arguments, before it is known which keys there are: a key's value that stands apart is taken
    for one. Where help is asked for, it is given, and that is the end."""
    with naming_flags():
        return [word for word in flags.FLAGS(list(argv), known_only=True)[1:] if not word.startswith("-")]


def _of_card(argv, checkpoint):
    """Return the checkpoint as it was given, the configuration of its card with what flags change of it, and
    positional arguments. A run that is training may replace its newest checkpoint meanwhile."""
    from structvit_jax.training import (
        mesh,  # here, so that a mistake in other commands' flags is told at once
    )
    from structvit_jax.training.checkpoint import read_card

    key = "--config.mesh.device="  # asked first, since reading the card opens a device
    mesh.select_devices(next((word.removeprefix(key) for word in argv if word.startswith(key)), "auto"))
    card = read_card(checkpoint)
    with naming_flags():
        config = from_card(card["config"])
        flag = config_flags.DEFINE_config_dict("config", config, "See structvit_jax.config.")
        words = flags.FLAGS(list(argv))[1:]
    check_config(flag.value)
    mesh.use_compilation_cache(flag.value.mesh.compilation_cache)
    return checkpoint, flag.value, words


def _unknown_key(message: str) -> str:
    """One line from what ml_collections says of a key that a locked configuration does not have."""
    if near := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):
        return f"the configuration has no key {near[2]!r}. Did you mean {near[1]!r}?"
    key = re.sub(r"^\W*(?:Key\W+)?(\w+).*", r"\1", message, flags=re.DOTALL)
    known = re.findall(r"'(\w+)\\?':", message)
    return f"the configuration has no key {key!r}.{did_you_mean(key, known) if known else ''}"


def _last_line(error: BaseException) -> str:
    """What an error says, without the traceback that ml_collections puts before it."""
    line = [line for line in str(error).splitlines() if line.strip()][-1].strip()
    return line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
