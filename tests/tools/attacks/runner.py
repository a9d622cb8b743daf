"""Run cases in forks of this process, limit their time and memory, and find what they leave behind.

A fork starts in milliseconds because the package is imported before. Each case is a session, so that all its
processes can be counted and killed together.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import functools
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from attacks.case import Case, Result
from attacks.sandbox import Sandbox

_TICK = 0.05  # seconds between checks of time and memory
_GRACE = 3.0  # seconds for child processes to end after the command
_LARGEST_FILE = 2**30  # limit of the size of a file, in bytes


@dataclasses.dataclass
class _Running:
    """A case that is running."""

    case: Case
    here: Path
    pid: int
    result: Result
    started: float
    before: dict[str, tuple[int, int]]  # watched files at its start
    ended: float = 0.0  # time at which its first process ended


class Runner:
    """Run cases `jobs` at a time."""

    def __init__(self, sandbox: Sandbox, *, jobs: int, seed: int):
        self._sandbox, self._jobs, self._seed = sandbox, jobs, seed
        self._running: dict[int, _Running] = {}
        self._count = 0
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: adopt orphans
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # for sigtimedwait

    def run(self, cases: Iterable[Case]) -> Iterator[tuple[Case, Result, Path]]:
        """Yield each case with its result and its folder, in the order of their ends."""
        waiting = iter(cases)
        more = True
        while more or self._running:
            while more and len(self._running) < self._jobs:
                if (case := next(waiting, None)) is None:
                    more = False
                else:
                    self._start(case)
            if self._running:
                signal.sigtimedwait([signal.SIGCHLD], _TICK)
                yield from self._finished()

    def close(self) -> None:
        """Kill the running cases."""
        sessions = _sessions()
        for pid in self._running:
            _kill(sessions.get(pid, {}))

    def _start(self, case: Case) -> None:
        self._count += 1
        here = self._sandbox.new_folder(self._count)
        for part in case.copies:
            shutil.copytree(self._sandbox.path(part), here / part, symlinks=True)
        if case.prepare:
            case.prepare(here, random.Random(f"{self._seed}:{case}"))
        arguments = tuple(self._sandbox.fill(argument, here) for argument in case.arguments)
        environment = self._sandbox.environment(here)
        for key, value in case.environment.items():
            environment.pop(key, None)
            if value is not None:
                environment[key] = self._sandbox.fill(value, here)
        before = self._sandbox.watched()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        started = time.monotonic()
        if not (pid := os.fork()):
            _child(case, here, arguments, environment)
        result = Result((case.module, *arguments))
        self._running[pid] = _Running(case, here, pid, result, started, before)

    def _finished(self) -> Iterator[tuple[Case, Result, Path]]:
        self._reap()
        sessions = _sessions()
        for running in list(self._running.values()):
            members = sessions.get(running.pid, {})
            self._enforce_limits(running, members)
            if not running.ended or (members and time.monotonic() - running.ended < _GRACE):
                continue
            del self._running[running.pid]
            running.result.left = [] if running.result.killed else list(members.values())
            _kill(members)
            self._inspect(running)
            yield running.case, running.result, running.here

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self._running:
                running = self._running[pid]
                running.ended = time.monotonic()
                running.result.code = os.waitstatus_to_exitcode(status)
                running.result.seconds = running.ended - running.started
                running.result.cpu_seconds = usage.ru_utime + usage.ru_stime
                running.result.megabytes = max(running.result.megabytes, usage.ru_maxrss / 1024)

    def _enforce_limits(self, running: _Running, members: dict[int, str]) -> None:
        """Kill a case that exceeds its time or memory."""
        result, case = running.result, running.case
        result.megabytes = max(result.megabytes, sum(map(_own_megabytes, members)))
        if result.killed:
            _kill(members)
        elif result.megabytes > case.megabytes and not running.ended:
            result.killed = "memory"
            _kill(members)
        elif not running.ended and _late(time.monotonic() - running.started, case.seconds, members):
            result.killed = "hang"
            _kill(members)

    def _inspect(self, running: _Running) -> None:
        """Read the output of a case, and find stray files and connections."""
        result, here = running.result, running.here
        for name in ("stdout", "stderr"):
            content = (here.parent / f"{here.name}.{name}").read_bytes()[: 2**20]
            setattr(result, name, content.decode(errors="replace"))
        after = self._sandbox.watched()
        result.strays = [path for path in after if after[path] != running.before.get(path)]
        removed = sorted(running.before.keys() - after.keys())
        for other in self._running.values():  # which these did not write
            other.before |= {path: after[path] for path in result.strays}
            other.before = {path: value for path, value in other.before.items() if path not in removed}
        result.strays += [f"{path} (removed)" for path in removed]
        if (here / "~").exists():
            result.strays.append("a folder named ~")
        if not result.killed and (here / "tmp").is_dir():
            result.strays += [f"TMPDIR/{name}" for name in os.listdir(here / "tmp")]
        result.contacts = self._sandbox.contacts()
        network = here.parent / f"{here.name}.network"
        result.reached = sorted(set(network.read_text().split())) if network.exists() else []


def _child(case: Case, here: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    """Run a case in the forked process; never returns."""
    code = 70  # an error of the harness
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
        files = [os.devnull, *(str(here.parent / f"{here.name}.{name}") for name in ("stdout", "stderr"))]
        for number, path in enumerate(files):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        sys.addaudithook(functools.partial(_stay_here, str(here.parent / f"{here.name}.network")))
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        if case.first:
            case.first()
        if case.python is not None:
            _exec(case, arguments)
        sys.path.insert(0, str(here))  # as `python -m` does
        sys.argv = [case.module, *arguments]
        code = _exit_code(functools.partial(runpy.run_module, case.module, None, "__main__", True))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _stay_here(record: str, event: str, arguments: tuple[object, ...]) -> None:
    """Refuse and record connections to other machines than this one."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
    elif event == "socket.getaddrinfo" and arguments[0]:
        host = str(arguments[0])
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname()):
        with open(record, "a") as file:
            file.write(f"{host}\n")
        raise OSError(errno.ENETUNREACH, f"attacks stay on this machine, away from {host}")


def _exec(case: Case, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, *(case.python or ()), "-m", case.module, *arguments]
    script = f'exec "$0" "$@" {case.redirect}'
    os.execve("/bin/sh", ["sh", "-c", script, *command], dict(os.environ))


def _exit_code(command: Callable[[], object]) -> int:
    """Run a command as an interpreter does, and return its exit code."""
    code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # end the workers of pools
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120
    return code


def _sessions() -> dict[int, dict[int, str]]:
    """Return the living processes of every session: {session: {pid: name}}."""
    found: dict[int, dict[int, str]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            head, _, tail = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")
        except OSError:
            continue
        state, _, _, session = tail.split()[:4]
        if state not in "ZX":
            found.setdefault(int(session), {})[int(entry)] = head.partition("(")[2]
    return found


def _own_megabytes(pid: int) -> float:
    """Return the memory of a process that is not backed by a file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(values[key].split()[0]) for key in ("RssAnon", "RssShmem") if key in values) / 1024


def _late(elapsed: float, limit: float, pids: Iterable[int]) -> bool:
    """Return whether a case exceeded its time limit.

    On a busy machine, time spent waiting for a core is not counted, up to a share given by the load.
    """
    if elapsed < limit:
        return False
    most = elapsed * (1 - min(1.0, (os.cpu_count() or 1) / max(os.getloadavg()[0], 1e-3)))
    return elapsed - min(most, sum(map(_seconds_in_queue, pids))) > limit


def _seconds_in_queue(pid: int) -> float:
    """Return how long runnable threads of a process waited for a core."""
    waited = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            waited += int(task.read_text().split()[1])
    return waited / 1e9


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
