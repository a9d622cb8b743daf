"""Settings of the whole process (signals, hooks, output, memory allocator), and exit codes of commands.

Nothing is set at import. This module imports the standard library only, because commands call it before slow
imports.
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
from types import TracebackType
from typing import Any, NoReturn

from structvit_jax.runtime import signals
from structvit_jax.utils.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE, Stopped, UserError
from structvit_jax.utils.failures import UnreachableError, is_transient, printable, system_failure


def prepare(*, trains: bool) -> None:
    """Apply the settings of a command, which last until its process ends. Call it before slow imports.

    Args:
      trains: whether the command trains; signals are then handled by `structvit_jax.runtime.signals`.
    """
    sys.excepthook = _exit_on_interrupt
    sys.unraisablehook = _ignore_closed_loops
    if trains:
        signals.LISTENER.start(ends_process=True)


def _exit_on_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the process on Ctrl-C, even in a C extension that would only print the exception and continue."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _ignore_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """Hide the "Event loop is closed" exceptions of coroutines.

    Orbax and TensorStore cancel their other coroutines after one has failed, and these then raise them.
    """
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory and use huge pages, which is faster for training on the CPU.

    By default glibc returns large blocks to the system at once, and every training step requests them again,
    one small page at a time. Call this before JAX starts its threads, because threads that already run
    keep their own memory arenas. It cannot be undone.
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
    block = libc.malloc(size)  # this reserves addresses only: pages that are never written take no memory
    if block:
        first = -(-block // page) * page
        libc.madvise(first, (block + size - first) // page * page, madv_hugepage)
        libc.free(block)


@contextlib.contextmanager
def hidden_modules(*names: str) -> Iterator[None]:
    """Make imports of these modules fail within the context, unless they are loaded already."""
    hidden: dict[str, Any] = dict.fromkeys(set(names) - sys.modules.keys())
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Run the body of a command; an expected failure becomes one line on stderr and an exit code.

    Expected failures are `UserError`, `Stopped`, Ctrl-C, a standard output that cannot be written, and errors
    of the operating system or a bucket. Any other exception is a bug and keeps its traceback.
    """
    _protect_output()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # flush now, while a failure can still be reported
    except BrokenPipeError:  # the program that read the output has ended, so no message is needed
        os._exit(1)
    except Stopped as stop:
        _exit(str(stop), EXIT_RESUMABLE, stop)
    except KeyboardInterrupt as interrupt:
        _exit("interrupted", EXIT_INTERRUPTED, interrupt)
    except UserError as error:
        _exit(f"error: {error}", error.exit_code, error)
    except Exception as error:
        if not (reason := system_failure(error)):
            raise
        where = getattr(error, "filename", None)
        kind = UnreachableError if is_transient(error) else UserError
        failure = kind(f"{where} cannot be used: {reason}" if where else reason)
        _exit(f"error: {failure}", failure.exit_code, failure)


def _exit(line: str, code: int, cause: BaseException) -> NoReturn:
    with contextlib.suppress(OSError):  # if it cannot be printed, the exit code is enough
        print(printable(line), file=sys.stderr, flush=True)
    raise SystemExit(code) from cause


class _Output(io.FileIO):
    """Standard output that reports its first failure as a `UserError` and then drops all output.

    A closed terminal (EIO) is not a failure: it also sends SIGHUP, and the run then saves and ends.
    """

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream = stream  # keep a reference: a garbage-collected stream closes the file
        self._failed = False

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


def _protect_output() -> None:
    """Make sys.stdout report failures as `_Output` does, and escape characters that it cannot encode."""
    stream = sys.stdout
    if stream is None:  # standard output was closed before the start
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        return
    if type(stream) is not io.TextIOWrapper:  # already replaced, for example in a test or notebook
        return
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if isinstance(raw, _Output):
        return
    output = _Output(stream)
    sys.stdout = io.TextIOWrapper(
        output if raw is stream.buffer else io.BufferedWriter(output),  # python -u does not buffer
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
