"""Process-wide settings of commands: signals, hooks, output, the allocator; and exit codes.

Nothing is set at import. Only the standard library is imported, since a command prepares its process before
the imports that take seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import sys
from collections.abc import Iterator
from platform import libc_ver
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
    """Apply the settings of a command that last until its process ends, before its imports.

    Ctrl-C prints one line instead of a traceback, reads and writes that were given up end silently, and a
    command that trains listens to signals, see `structvit_jax.runtime.signals`. `exit_in_one_line` protects
    the output.

    Args:
      trains: whether a signal should save the run of this command.
    """
    sys.excepthook = signals.excepthook
    sys.unraisablehook = _ignore_closed_loops
    if trains:
        signals.LISTENER.start(ends_process=True)


def _ignore_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """Drop what TensorStore's and Orbax's coroutines raise that end after one of them has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory and take it in large pages, for computations on the CPU.

    By default it returns large blocks at once, and every training step asks for them again, page by small
    page. Call this before JAX starts its threads, which keep the allocator that they find. It cannot be
    undone.
    """
    if libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max, m_arena_max, madv_hugepage = -1, -4, -8, 14  # from glibc's headers
    libc, page = ctypes.CDLL(None), 2**21
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, -1)):
        libc.mallopt(option, value)
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)  # of addresses: untouched, it takes no memory
    if block:
        first = -(-block // page) * page
        libc.madvise(first, (block + size - first) // page * page, madv_hugepage)
        libc.free(block)


@contextlib.contextmanager
def hidden_modules(*names: str) -> Iterator[None]:
    """Make imports of these modules fail within the context, unless they are loaded already."""
    hidden: dict[str, Any] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Run the body of a command; an expected failure becomes one line on stderr and an exit code.

    Expected are `UserError`, `Stopped`, Ctrl-C, a standard output that cannot be written, and errors of the
    operating system or a bucket. Any other exception is a bug and keeps its traceback.
    """
    _protect_output()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now, while a failure can be reported
    except BrokenPipeError:  # the reader of the output has ended and expects no more
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


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):  # nowhere to print it; the exit code remains
        print(printable(line), file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """Standard output that reports its first failure as a `UserError` and then drops all output.

    A terminal that was closed is no failure: SIGHUP comes with it, and a run saves before it ends.
    """

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream, self._failed = stream, False  # a collected stream would close the file

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
    """Make sys.stdout report failures as `_Output` does, and escape characters that it cannot encode."""
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
