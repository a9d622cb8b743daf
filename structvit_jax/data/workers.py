"""Child processes that apply a function to numbers and return the results in order, see `in_processes`.

They are made to be killed, and to be killed with:

- They start with SIGTERM, SIGINT and SIGHUP blocked. A signal to the process group or from a terminal reaches
  the parent, which decides, and never takes the workers away from it.
- Each is connected to its parent by a socket pair and exits when the parent's end is closed, which the kernel
  does however the parent ends.
- Results travel in anonymous memory whose descriptors are passed through the socket. There are no shared
  memory names, semaphores, temporary files or helper processes that could be left behind.

This file is also the program that a worker runs. It starts before anything else is imported, so that a worker
notices at any time that its parent is gone.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple, NoReturn, TypeVar

T = TypeVar("T")
Note = Callable[[str], None]  # what a function calls to say what it works on, in case it kills its process

_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NOTE = 512  # bytes
_ALIGNMENT = 64  # bytes; JAX takes such arrays without a copy on a CPU


class DeadWorker(NamedTuple):
    """A worker that died."""

    number: int  # what it was working on
    pid: int
    code: int  # its exit code; negative for the signal that killed it
    note: str  # the last note of its function; "" for none


def in_processes(
    function: Callable[[int, Note], T],
    numbers: Iterable[int],
    count: int,
    *,
    ahead: int,
    on_death: Callable[[DeadWorker], T],
) -> Generator[T]:
    """Yield function(number, note) for every number, in order, computed in `count` processes.

    Args:
      function: of a number and a `Note`; it is pickled, those of the main module by value. Exceptions that it
        raises are raised here.
      ahead: how many numbers each process is given in advance, the one that it works on included.
      on_death: returns the result for the number that a process died of, or raises. A new process takes over.
    """
    pickled = _pickle(function)
    pool: list[_Worker] = []
    pending: collections.deque[tuple[int, int]] = collections.deque()  # numbers in order, and who has them
    asked, source = 0, iter(numbers)
    try:
        while True:
            while len(pending) < ahead * count and (number := next(source, None)) is not None:
                place = asked % count
                if place == len(pool):
                    pool.append(_Worker(pickled))
                pool[place].ask(number)
                pending.append((number, place))
                asked += 1
            if not pending:
                return
            number, place = pending.popleft()
            try:
                result: T = pool[place].answer()
            except (EOFError, ConnectionError):
                result = on_death(pool[place].describe_death(number))
                pool[place].close()
                pool[place] = _Worker(pickled)
                for other, its_place in pending:
                    if its_place == place:
                        pool[place].ask(other)
            yield result
    finally:
        for worker in pool:
            worker.close()


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, function: bytes):
        self._connection, theirs = Pipe()
        self._note = _anonymous_file()
        descriptors = (theirs.fileno(), self._note)
        with theirs, _signals_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
            )
        with contextlib.suppress(ConnectionError):  # it died; its first answer will show it
            self._connection.send(sys.path)
            self._connection.send_bytes(function)

    def ask(self, number: int) -> None:
        """Give it a number to work on after those before."""
        with contextlib.suppress(ConnectionError):
            self._connection.send(number)

    def answer(self) -> Any:
        """Return the result for the first number without one, or raise its exception.

        Raises:
          EOFError, ConnectionError: the worker is dead.
        """
        ok, data, sizes = self._connection.recv()
        value = pickle.loads(data, buffers=self._receive_buffers(sizes))
        if not ok:
            raise value
        return value

    def _receive_buffers(self, sizes: list[int]) -> list[memoryview]:
        if not sizes:
            return []
        descriptor = recv_handle(self._connection)
        try:
            memory = memoryview(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)
        offsets = _offsets(sizes)
        return [memory[start : start + size] for start, size in zip(offsets, sizes, strict=True)]

    def describe_death(self, number: int) -> DeadWorker:
        """Describe its death, of this number."""
        code = self._process.wait()
        note = os.pread(self._note, _NOTE, 0).rstrip(b"\0 ")
        return DeadWorker(number, self._process.pid, code, os.fsdecode(note))

    def close(self) -> None:
        """End the process: it has nothing to lose."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        os.close(self._note)


def _pickle(function: Callable[..., Any]) -> bytes:
    import cloudpickle  # not in the worker, which starts with this file

    return cloudpickle.dumps(function)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals in this thread; child processes inherit it, and those that arrive meanwhile are kept."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _anonymous_file() -> int:
    """Return the descriptor of a new file that has no name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("structvit_jax")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _offsets(sizes: list[int]) -> list[int]:
    """Return where buffers of these sizes start in a file."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets


# What runs in a worker.


def _serve(descriptor: int, note_descriptor: int) -> None:
    threading.Thread(target=_exit_with_parent, args=(descriptor,), daemon=True).start()

    def note(text: str) -> None:
        os.pwrite(note_descriptor, os.fsencode(text).ljust(_NOTE)[:_NOTE], 0)  # whole at any moment

    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        _answer_all(Connection(descriptor), note)
    os._exit(0)


def _answer_all(connection: Connection, note: Note) -> NoReturn:
    sys.path[:] = connection.recv()
    pickled, function = connection.recv_bytes(), None
    while True:
        number = connection.recv()
        try:
            function = function or pickle.loads(pickled)
            _send(connection, True, function(number, note))
        except Exception as error:
            _send(connection, False, _portable(error))


def _exit_with_parent(descriptor: int) -> None:
    """End this process when the parent's end of the socket is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)  # of a hang-up alone
    poll.poll()
    os._exit(0)


def _send(connection: Connection, ok: bool, value: Any) -> None:
    """Send a value: its arrays in anonymous memory, the rest through the socket."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    if not any(sizes):
        connection.send((ok, pickle.dumps(value), []))
        return
    with open(_anonymous_file(), "wb") as file:
        for offset, view in zip(_offsets(sizes), views, strict=True):
            file.seek(offset)
            file.write(view)
        file.truncate(_offsets([*sizes, 0])[-1])
        file.flush()
        connection.send((ok, data, sizes))
        send_handle(connection, file.fileno(), None)


def _portable(error: Exception) -> Exception:
    """Return an exception that another process can load, with its traceback as a note."""
    text = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a constructor raises
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{text}")
    return error


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
