"""Worker processes that apply a function to numbers and return the results in order, see `in_processes`.

Workers survive signals and never outlive their parent:

- They start with SIGTERM, SIGINT and SIGHUP blocked. A signal to the process group or from a terminal reaches
  the parent, which decides what to do while its workers keep running.
- A socket pair connects each worker to its parent. However the parent ends, the kernel closes the socket,
  and the worker exits.
- Results travel in anonymous memory whose descriptors are passed through the socket. No shared memory names,
  semaphores, temporary files or helper processes can be left behind.

A worker runs this file as its program and watches its parent before it imports anything else.
"""

from __future__ import annotations

import collections
import contextlib
import gc
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
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# Records what a function is working on, so that it can be reported if the worker dies.
Note = Callable[[str], None]

_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NOTE_BYTES = 512  # maximum length of a note
_ALIGNMENT = 64  # bytes; JAX uses arrays with this alignment on a CPU without copying them


class DeadWorker(NamedTuple):
    """A worker that died."""

    pid: int
    code: int  # exit code, or the negative number of the signal that killed it
    note: str  # the last note that its function made, or ""


def in_processes(
    function: Callable[[int, Note], T],
    numbers: Iterable[int],
    count: int,
    *,
    ahead: int,
    on_death: Callable[[DeadWorker], T],
    setup: Callable[[], None] | None = None,
    descriptors: Sequence[int] = (),
) -> Generator[T]:
    """Yield function(number, note) for every number, in order, computed in `count` processes.

    Args:
      function: the function, which is pickled with cloudpickle. Its exceptions are raised here.
      numbers: its arguments.
      count: number of processes.
      ahead: how many numbers are queued for each process, including the one that it works on.
      on_death: called if a process dies; returns the result for the number that it was working on, or raises.
        A new process replaces the dead one.
      setup: called once in every process.
      descriptors: open files that the processes inherit, with the same descriptors.
    """
    import cloudpickle  # imported here: workers run this file and do not need it

    pickled = cloudpickle.dumps((function, setup))
    pool: list[_Worker] = []
    pending: collections.deque[tuple[int, int]] = collections.deque()  # (number, worker) in order
    queued, source = 0, iter(numbers)
    try:
        while True:
            while len(pending) < ahead * count and (number := next(source, None)) is not None:
                worker = queued % count
                if worker == len(pool):
                    pool.append(_Worker(pickled, descriptors))
                pool[worker].ask(number)
                pending.append((number, worker))
                queued += 1
            if not pending:
                return
            _, worker = pending.popleft()
            try:
                ok, result = pool[worker].answer()
            except (EOFError, ConnectionError):
                ok, result = True, on_death(pool[worker].wait())
                pool[worker].close()
                pool[worker] = _Worker(pickled, descriptors)
                for other, its_worker in pending:
                    if its_worker == worker:
                        pool[worker].ask(other)
            if not ok:
                raise result
            yield result
    finally:
        for process in pool:
            process.close()


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, pickled: bytes, inherited: Sequence[int]):
        self._connection, theirs = Pipe()
        self._note = anonymous_file()
        descriptors = (theirs.fileno(), self._note)
        # The child inherits the blocked signals. Signals that arrive here meanwhile are delivered afterwards.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, *map(str, descriptors)],
                pass_fds=(*descriptors, *inherited),
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        with contextlib.suppress(ConnectionError):  # the worker is dead; `answer` will report that
            self._connection.send(sys.path)
            self._connection.send_bytes(pickled)

    def ask(self, number: int) -> None:
        """Queue a number for the worker."""
        with contextlib.suppress(ConnectionError):
            self._connection.send(number)

    def answer(self) -> tuple[bool, Any]:
        """Return True and the result for the oldest queued number, or False and the exception it raised.

        Raises:
          EOFError, ConnectionError: the worker is dead.
        """
        ok, data, sizes = self._connection.recv()
        buffers: list[memoryview] = []
        if sizes:
            descriptor = recv_handle(self._connection)
            try:
                memory = memoryview(mmap.mmap(descriptor, 0))
            finally:
                os.close(descriptor)
            offsets = _offsets(sizes)
            buffers = [memory[start : start + size] for start, size in zip(offsets, sizes, strict=True)]
        return ok, pickle.loads(data, buffers=buffers)

    def wait(self) -> DeadWorker:
        """Wait for the worker to die and return how it died."""
        code = self._process.wait()
        note = os.pread(self._note, _NOTE_BYTES, 0).rstrip(b"\0 ")
        return DeadWorker(self._process.pid, code, os.fsdecode(note))

    def close(self) -> None:
        """Kill the process; it has nothing to save."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        os.close(self._note)


def anonymous_file() -> int:
    """Return the descriptor of a new file without a name, in memory if the system supports it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("structvit_jax")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _offsets(sizes: list[int]) -> list[int]:
    """Return the aligned offset of each buffer in a file, given their sizes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets


# The worker's side.


def _serve(descriptor: int, note_descriptor: int) -> None:
    """Answer queued numbers until the parent is gone."""
    threading.Thread(target=_exit_with_parent, args=(descriptor,), daemon=True).start()

    def note(text: str) -> None:
        padded = os.fsencode(text).ljust(_NOTE_BYTES)[:_NOTE_BYTES]
        os.pwrite(note_descriptor, padded, 0)  # one call, so that the parent never reads half a note

    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        connection = Connection(descriptor)
        sys.path[:] = connection.recv()
        pickled, function = connection.recv_bytes(), None
        while True:
            number = connection.recv()
            try:
                if function is None:
                    function, setup = pickle.loads(pickled)
                    if setup:
                        setup()
                    gc.freeze()  # what exists now stays; the collector need not look at it again
                _send(connection, True, function(number, note))
            except Exception as error:
                _send(connection, False, _portable(error))
    os._exit(0)


def _exit_with_parent(descriptor: int) -> None:
    """End this process when the parent's end of the socket is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)  # reports hang-ups only
    poll.poll()
    os._exit(0)


def _send(connection: Connection, ok: bool, value: Any) -> None:
    """Send a value: arrays in anonymous memory, the rest through the socket."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    if not any(sizes):
        connection.send((ok, pickle.dumps(value), []))
        return
    with open(anonymous_file(), "wb") as file:
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
    except Exception:  # constructors can raise anything
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{text}")
    return error


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
