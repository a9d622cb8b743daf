"""The lock of a workdir: two runs never write into it at once.

The lock is a small file that its owner rewrites every few seconds. Two mechanisms decide between runs that
start at the same time:

- On one machine, `flock` on the workdir. Runs look for an owner and write the file while they hold it, so
  exactly one wins, however slow the disk is. The kernel releases it with the process, and it leaves no file.
- Between machines, in a bucket or on a network file system with a local `flock`, neither that nor a common
  clock is reliable. A run writes its name, waits for a rival's write to arrive, and owns the lock if its name
  is still there. It waits longer if its own write took long.

An owner that has died stops rewriting the file. An owner that reads another name in it stops its run.
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
_SETTLE = {True: 2.0, False: 0.1}  # seconds for a rival's write to arrive, in a bucket and on a disk
_SLOWER = 3  # a rival's write may take this many times as long as our own


class WorkdirLock:
    """Holds the lock within its context.

    Raises:
      UserError: on entering, another run holds it; on `check`, another run has taken it.
    """

    def __init__(self, workdir: epath.Path, *, expiry: float = _EXPIRY, renew: float = _RENEW):
        self._path, self._expiry, self._renew = workdir / FILE, expiry, renew
        self._owner: dict[str, Any] = {**_machine(), "pid": os.getpid(), "born": _born()}
        self._token, self._beat = uuid.uuid4().hex, 0
        self._lost = ""
        self._closing = threading.Event()

    def __enter__(self) -> WorkdirLock:
        with self._alone_on_this_machine():
            self._wait_until_free()
            started = time.monotonic()
            self._write()
        took = time.monotonic() - started
        time.sleep(max(_SETTLE[is_bucket(self._path)], _SLOWER * took))
        if (found := self._read()).get("token") != self._token:
            raise UserError(self._taken(found))
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join()
        self.release()

    def release(self) -> None:
        """Remove the lock if it is this run's."""
        if self._read().get("token") == self._token:
            self._path.unlink()

    def check(self) -> None:
        """Raise UserError if the lock was lost. Call it before writing."""
        if self._lost:
            raise UserError(self._lost)

    @contextlib.contextmanager
    def _alone_on_this_machine(self) -> Iterator[None]:
        """Exclude other runs of this machine at the same time, if the file system can."""
        if is_bucket(self._path):
            yield
            return
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _wait_until_free(self) -> None:
        """Return when nobody holds the lock.

        A dead owner on this machine is ignored at once. One on another machine counts as dead after it has
        not written for the time of expiry.
        """
        found = self._read()
        if not found:
            return
        if _is_here(found):
            if _is_alive(found):
                raise UserError(self._taken(found))
            return
        log(
            f"workdir is locked by {_describe(found)}; waiting {self._expiry:.0f} s to see whether that run"
            " is alive"
        )
        deadline = time.monotonic() + self._expiry
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._renew / 2))
            now = self._read()
            if not now:
                return
            if now != found:
                raise UserError(self._taken(now))

    def _read(self) -> dict[str, Any]:
        return _read(self._path)

    def _taken(self, owner: dict[str, Any]) -> str:
        return (
            f"{self._path.parent} is being written by another run ({_describe(owner)});"
            " wait until it ends, or choose another --workdir"
        )

    def _gone(self) -> str:
        return (
            f"{self._path} is gone: it was removed, or another run has started and ended while this one could"
            " not renew it; re-run the command to resume"
        )

    def _write(self) -> None:
        self._beat += 1
        write_json(self._path, {**self._owner, "token": self._token, "beat": self._beat})

    def _keep(self) -> None:
        while not self._closing.wait(self._renew):
            with contextlib.suppress(Exception):  # outages may pass; buckets raise errors of any type
                found = self._read()
                if found.get("token") != self._token:
                    self._lost = self._taken(found) if found else self._gone()
                    return
                self._write()


def live_owner(workdir: epath.Path) -> str:
    """Describe the run that holds the lock of a workdir; "" if none does, or one that is known to be dead."""
    owner = _read(workdir / FILE)
    return _describe(owner) if owner and not (_is_here(owner) and not _is_alive(owner)) else ""


def _read(path: epath.Path) -> dict[str, Any]:
    """Return the owner that the file names; {} if there is no file or a kill left it incomplete."""
    try:
        return read_json(path) or {}
    except FileNotFoundError:
        return {}


def _machine() -> dict[str, Any]:
    """Return what identifies the scope in which process ids are unique."""
    return {"host": socket.gethostname(), "boot": _boot(), "namespace": _pid_namespace()}


def _is_here(owner: dict[str, Any]) -> bool:
    return all(owner.get(key) == value for key, value in _machine().items())


def _describe(owner: dict[str, Any]) -> str:
    return f"host {owner.get('host', 'unknown')}, pid {owner.get('pid', 'unknown')}"


def _boot() -> str:
    """Return the id of this boot of the machine; "" if unknown."""
    try:
        return epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    """Return the id of this container's process namespace; "" if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _born(pid: int | str = "self") -> str:
    """Return when a process was started, in the kernel's ticks, because process ids are reused.

    It is "" for a process that has ended, also for a zombie.
    """
    try:
        state, *fields = epath.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, IndexError, ValueError):
        return ""


def _is_alive(owner: dict[str, Any]) -> bool:
    return bool(owner.get("born")) and _born(owner.get("pid", "")) == owner["born"]
