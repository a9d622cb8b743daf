"""The lock of a workdir: two runs never write into it at once.

The lock is a small file that names its owner. The owner rewrites it every few seconds; if it stops doing so,
it counts as dead. An owner that finds another name in the file stops its run. If two runs start at the same
time, one wins:

- On one machine, a run holds `flock` on the workdir while it looks for an owner and writes the file. So
  exactly one run wins, however slow the disk is. The kernel releases `flock` when the process ends.
- Between machines there may be no `flock` (in a bucket, and on network file systems where it is local) and no
  common clock. A run writes its name, and waits long enough for the write of a competing run to arrive. It
  owns the lock if the file then still has its name. It waits longer if its own write took long.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import read_json, write_json
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import is_bucket

FILE = "lock.json"
_RENEW = 10.0  # seconds between writes of the owner
_EXPIRY = 60.0  # seconds without a write after which an owner on another machine counts as dead
# Seconds until the write of a competing run has arrived: in a bucket (True) and on a disk (False).
_SETTLE = {True: 2.0, False: 0.1}
_SLOWER = 3  # the write of a competing run may take this many times as long as that of this run


class WorkdirLock:
    """Hold the lock of a workdir within a context.

    Raises:
      UserError: another run holds the lock (on entering), or has taken it (in `check`).
    """

    def __init__(self, workdir: epath.Path, *, expiry: float = _EXPIRY, renew: float = _RENEW):
        self._path, self._expiry, self._renew = workdir / FILE, expiry, renew
        self._owner = {
            **_machine(),
            "pid": os.getpid(),
            "born": _start_time("self"),
            "token": uuid.uuid4().hex,
        }
        self._beat = 0
        self._lost = ""  # error message if the lock was lost
        self._closing = threading.Event()

    def __enter__(self) -> WorkdirLock:
        with self._flock():
            self._wait_until_free()
            started = time.monotonic()
            self._write()
        took = time.monotonic() - started
        time.sleep(max(_SETTLE[is_bucket(self._path)], _SLOWER * took))
        if not self._is_ours(found := _read(self._path)):
            raise UserError(self._taken_message(found))
        self._thread = threading.Thread(target=self._renew_until_closed, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()
        self.release()

    def release(self) -> None:
        """Remove the lock if this run owns it."""
        if self._is_ours(_read(self._path)):
            self._path.unlink()

    def check(self) -> None:
        """Raise UserError if the lock was lost. Call it before writing."""
        if self._lost:
            raise UserError(self._lost)

    @contextlib.contextmanager
    def _flock(self) -> Iterator[None]:
        """Exclude other runs of this machine, if the file system supports `flock`."""
        if is_bucket(self._path):
            yield
            return
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _wait_until_free(self) -> None:
        """Return as soon as nobody holds the lock.

        A dead owner on this machine is ignored at once. An owner on another machine counts as dead if it does
        not rewrite the file before the lock expires.

        Raises:
          UserError: the owner is alive.
        """
        found = _read(self._path)
        if not found or (is_alive := _is_alive(found)) is False:
            return
        if is_alive:
            raise UserError(self._taken_message(found))
        log(
            f"workdir is locked by {_describe(found)}; waiting {self._expiry:.0f} s to see whether that run"
            " is alive"
        )
        deadline = time.monotonic() + self._expiry
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._renew / 2))
            now = _read(self._path)
            if not now:
                return
            if now != found:
                raise UserError(self._taken_message(now))

    def _is_ours(self, found: dict[str, Any]) -> bool:
        return found.get("token") == self._owner["token"]

    def _taken_message(self, owner: dict[str, Any]) -> str:
        if not owner:
            return (
                f"{self._path} is gone: it was removed, or another run has started and ended while this one"
                " could not renew it; re-run the command to resume"
            )
        return (
            f"{self._path.parent} is being written by another run ({_describe(owner)});"
            " wait until it ends, or choose another --workdir"
        )

    def _write(self) -> None:
        self._beat += 1
        write_json(self._path, {**self._owner, "beat": self._beat})

    def _renew_until_closed(self) -> None:
        while not self._closing.wait(self._renew):
            with contextlib.suppress(Exception):  # outages may pass; buckets raise errors of any type
                if not self._is_ours(found := _read(self._path)):
                    self._lost = self._taken_message(found)
                    return
                self._write()


def live_owner(workdir: epath.Path) -> str:
    """Describe the run that holds the lock of a workdir; "" if there is none, or it is known to be dead."""
    owner = _read(workdir / FILE)
    return "" if not owner or _is_alive(owner) is False else _describe(owner)


def _read(path: epath.Path) -> dict[str, Any]:
    """Return the owner in the file; {} if there is no file, or if a kill left it incomplete."""
    try:
        return read_json(path) or {}
    except FileNotFoundError:
        return {}


def _describe(owner: dict[str, Any]) -> str:
    return f"host {owner.get('host', 'unknown')}, pid {owner.get('pid', 'unknown')}"


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Return whether the owner's process runs.

    The answer is None, for unknown, if the owner is on another machine, or if there is no /proc.
    """
    if not owner.get("born") or any(owner.get(key) != value for key, value in _machine().items()):
        return None
    return _start_time(owner.get("pid")) == owner["born"]


def _machine() -> dict[str, Any]:
    """Return the host, boot and container, within which process ids are unique."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _start_time(pid: object) -> str:
    """Return the start time of a process in the kernel's ticks; "" if it has ended or there is no /proc.

    The start time distinguishes processes with the same id, because ids are reused. A zombie counts as ended.
    """
    try:
        state, *fields = epath.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, IndexError, ValueError):
        return ""
