"""What an entry point does to its process: signals, output and exit codes.

Nothing happens at import. Nothing but the standard library is imported: a command prepares before the imports
that take seconds.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from structvit_jax.runtime import signals
from structvit_jax.utils.errors import (
    EXIT_INTERRUPTED,
    EXIT_RESUMABLE,
    Stopped,
    UnreachableError,
    UserError,
    is_transient,
    printable,
    system_failure,
)


def prepare(*, trains: bool) -> None:
    """Set up the process of a command, before its imports.

    Args:
      trains: whether it trains, and a signal saves its run, see `structvit_jax.runtime.signals`.
    """
    signals.prepare_command(trains=trains)


@contextlib.contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Run the body of a command: an expected failure becomes one line on stderr and an exit code.

    Expected are `UserError`, `Stopped`, Ctrl-C, a standard output that cannot be written, and what the
    operating system or a bucket refuses. Any other exception is a bug and keeps its traceback.
    """
    _protect_output()
    sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now, while a failure can be reported
    except BrokenPipeError:  # the reader of the output has ended, and expects no more
        os._exit(1)
    except Stopped as stop:
        _print_error(str(stop))
        raise SystemExit(EXIT_RESUMABLE) from stop
    except KeyboardInterrupt as interrupt:
        _print_error("interrupted")
        raise SystemExit(EXIT_INTERRUPTED) from interrupt
    except UserError as error:
        _print_error(f"error: {error}")
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        if not (reason := system_failure(error)):
            raise
        where = getattr(error, "filename", None)
        kind = UnreachableError if is_transient(error) else UserError
        failure = kind(f"{where} cannot be used: {reason}" if where else reason)
        _print_error(f"error: {failure}")
        raise SystemExit(failure.exit_code) from failure


def _without_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a hook that leaves out what TensorStore's reads raise which end after one of them has failed."""

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return unraisablehook


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # nowhere to print it; the exit code remains
        print(printable(line), file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """Standard output that reports its first failure as an error of the user's and then drops the rest.

    A terminal that is gone is no failure: SIGHUP comes with it, and a run saves before it ends.
    """

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream, self._failed = stream, False  # the stream would close the file when it is collected

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            if error.errno == errno.EIO:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(
                f"standard output cannot be written: {error.strerror}; redirect it and re-run the command"
            ) from error


class _OutputBuffer(io.BufferedWriter):
    """The buffer before an `_Output`."""


def _protect_output() -> None:
    """Make sys.stdout report failures as `_Output` does, and print any text in any encoding."""
    stream = sys.stdout
    if stream is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    elif type(stream) is io.TextIOWrapper and not isinstance(stream.buffer, _OutputBuffer | _Output):
        output = _Output(stream)
        buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with python -u
        sys.stdout = io.TextIOWrapper(
            _OutputBuffer(output) if buffered else output,
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
