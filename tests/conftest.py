"""Tests run on the CPU, as eight fake devices of which most use one."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Commands that tests start share what they compile."""
    cache = tmp_path_factory.getbasetemp().parent / "jax_cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


def run(*arguments, **environment):
    """Runs `python -m structvit_jax.main` from the project's root, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "structvit_jax.main", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


class Command:
    """The same command in a fork of a process that has done its imports: a second instead of five."""

    _server = multiprocessing.get_context("forkserver")
    _server.set_forkserver_preload(["structvit_jax.main", "structvit_jax.training.loop", "sklearn.datasets"])

    def __init__(self, folder, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = folder / "stdout", folder / "stderr"
        self.process = self._server.Process(target=_command, args=(list(map(str, arguments)), *self._files))
        self.process.start()

    def wait(self):
        self.process.join(300)
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = (path.read_text() for path in self._files)
        return self


def _command(arguments, out, err):
    """The body of the forked process."""
    os.chdir(ROOT)
    os.environ["XLA_FLAGS"] = ""
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["main.py", *arguments]
    from structvit_jax import main

    main.run()


@pytest.fixture
def command(tmp_path_factory):
    """Runs the command to its end."""

    def run_to_end(*arguments):
        return Command(tmp_path_factory.mktemp("command"), *arguments).wait()

    return run_to_end
