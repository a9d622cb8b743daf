"""The lock of a workdir: two runs never write into it at once."""

import functools
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import QUICK, Command, same_as, slowly
from etils import epath

from structvit_jax.runtime import lock
from structvit_jax.runtime.lock import WorkdirLock
from structvit_jax.utils.errors import UserError

SLOWLY = functools.partial(slowly, 0.15)


def test_a_second_run_is_refused_and_the_first_continues(finished, refused, tmp_path):
    first = Command(tmp_path / "output", *QUICK, f"--workdir={tmp_path / 'run'}", first=SLOWLY)
    first.when((tmp_path / "run" / "lock.json").exists)
    line = refused(*QUICK, f"--workdir={tmp_path / 'run'}")
    assert f"is being written by another run (host {os.uname().nodename}, pid {first.process.pid});" in line
    assert first.wait().returncode == 0, first.stderr
    assert same_as(finished, tmp_path / "run") and not (tmp_path / "run" / "lock.json").exists()


HELD = "import sys, time; from etils import epath; from structvit_jax.runtime.lock import WorkdirLock;"
HELD += "WorkdirLock(epath.Path(sys.argv[1])).__enter__(); print('held', flush=True); time.sleep(100)"


def test_a_killed_owner_is_not_waited_for(place):
    """Although it is a zombie, since nobody has asked for its exit code."""
    owner = subprocess.Popen([sys.executable, "-c", HELD, str(place)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another run .*pid {owner.pid}"):
        WorkdirLock(place).__enter__()
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    with WorkdirLock(place) as mine:
        assert time.monotonic() - started < 2
        mine.check()
    owner.wait()
    owner.stdout.close()
    assert not (place / lock.FILE).exists()


def test_slow_disks_let_no_second_owner_in(tmp_path, monkeypatch):
    """Although both find the workdir free before one of them has written its name."""
    fsync, slow = os.fsync, threading.Event()

    def slower(descriptor):
        if threading.current_thread() is late:
            slow.set()
            time.sleep(0.5)
        fsync(descriptor)

    def enter(name):
        try:
            with WorkdirLock(epath.Path(tmp_path)):
                held.append(name)
                done.wait(10)
        except UserError as error:
            refused.append(str(error))

    held, refused, done = [], [], threading.Event()
    late = threading.Thread(target=enter, args=("late",))
    first = threading.Thread(target=enter, args=("first",))
    monkeypatch.setattr(os, "fsync", slower)
    late.start()
    slow.wait(10)
    first.start()
    while len(held) + len(refused) < 2 and first.is_alive():
        time.sleep(0.01)
    done.set()
    late.join()
    first.join()
    assert held == ["late"] and "is being written by another run" in refused[0]


def elsewhere(place, monkeypatch, proc=True, **options):
    """Return a lock of another machine, or of one without /proc."""
    with monkeypatch.context() as patch:
        if proc:
            patch.setattr(lock.socket, "gethostname", lambda: "another")
        else:
            patch.setattr(lock, "_start_time", lambda pid: "")
        return WorkdirLock(place, **options)


@pytest.mark.parametrize("proc", [True, False])
def test_an_owner_on_another_machine_is_waited_for(place, monkeypatch, proc):
    """If it renews the lock, the second run is refused; if it does not, the second run takes over."""
    owner = elsewhere(place, monkeypatch, proc, renew=0.2)
    with owner, pytest.raises(UserError, match="another run"):
        WorkdirLock(place, expiry=30).__enter__()
    silent = elsewhere(place, monkeypatch, proc, renew=1000)
    with silent:
        started = time.monotonic()
        with WorkdirLock(place, expiry=1, renew=0.2) as mine:
            assert time.monotonic() - started > 1
            mine.check()
            silent._renew = 0.1
    assert not (place / lock.FILE).exists()


def test_an_owner_that_lost_the_lock_stops(place, monkeypatch):
    """It leaves the lock to its new owner."""
    with WorkdirLock(place, renew=0.1) as mine:
        mine.check()
        theirs = elsewhere(place, monkeypatch)
        theirs._write()
        mine._thread.join(10)
        with pytest.raises(UserError, match="is being written by another run"):
            mine.check()
    assert (place / lock.FILE).exists()


def test_an_outage_that_passes_does_not_lose_the_lock(tmp_path, monkeypatch):
    with WorkdirLock(epath.Path(tmp_path), renew=0.05) as mine:
        write = mine._write
        monkeypatch.setattr(mine, "_write", lambda: os.write(-1, b"x"))
        time.sleep(0.3)
        mine.check()
        monkeypatch.setattr(mine, "_write", write)
        before = lock.read_json(tmp_path / lock.FILE)["beat"]
        time.sleep(0.3)
        assert lock.read_json(tmp_path / lock.FILE)["beat"] > before
        for _ in range(1000):  # a renewal in progress may write it again
            (tmp_path / lock.FILE).unlink(missing_ok=True)
            mine._thread.join(0.01)
            if not mine._thread.is_alive():
                break
        with pytest.raises(UserError, match="is gone"):
            mine.check()
