"""Fixtures and helpers. Tests run on the CPU, which is split into eight fake devices; most use one of them.

Tests of operations also run on a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -n 4 tests/ops
"""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NO_GCE_CHECK"] = "true"  # or clients of buckets wait for a metadata server
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads of PyTorch would spin while XLA computes
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":  # most programs take longer to compile than to run
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
else:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # TF32 rounds more than the tolerances allow
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the GPU

import fsspec
import jax
import jaxtyping
import pytest
from bucket import Bucket
from etils import epath

# Check the shapes in annotations of models and operations at every call.
_CHECKED = [f"structvit_jax.models.{name}" for name in ("blocks", "layers", "networks", "struct_attention")]
_CHECKED += [f"structvit_jax.ops.{name}" for name in ("attention", "convolution", "pointwise", "structsa")]
jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")

from structvit_jax import cli, main  # noqa: E402
from structvit_jax.data.dataset import ConfiguredDataset  # noqa: E402
from structvit_jax.performance import hardware  # noqa: E402
from structvit_jax.runtime import lock, mesh  # noqa: E402

# Tracing creates many long-lived objects. With the default thresholds, collections take a sixth of the time.
_GC_THRESHOLDS = 50_000, 10, 10
gc.set_threshold(*_GC_THRESHOLDS)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup

ROOT = Path(__file__).parent.parent
# XLA's older code generator for CPUs compiles in half the time. JAX 0.11 no longer accepts these options.
COMPILED_SOON = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
COMPILER = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if COMPILED_SOON else ""
)
os.environ["XLA_FLAGS"] += f" {COMPILER}"  # read when the first device is opened
CONFIG = "--config=configs/moving_digits.py"
SAME = ("result.json", "metrics.jsonl")  # files that an interruption must not change
# A run of seconds: a two-block DeiT on a few clips.
QUICK = [
    CONFIG,
    "--config.model.name=deit_tiny_struct_1_video",
    "--config.model.widths=(16,)",
    "--config.model.drop_path=0.1",
    "--config.data.batch_size=8",
    "--config.data.train_examples=40",
    "--config.data.test_examples=20",
    "--config.eval.batch_size=16",
    "--config.train.duration=12 steps",
    "--config.checkpoint.every=3 steps",
    "--config.eval.every=6 steps",
]


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Make all commands that tests start share one cache of compiled programs."""
    cache = tmp_path_factory.getbasetemp().parent / "jax_cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture
def tpu():
    """A sharding on a TPU that is not attached; operations are traced for it."""
    yield from _place("v5e:1x1")


@pytest.fixture
def gpu():
    """A sharding on a GPU that is not attached; operations are traced for it."""
    yield from _place("h100:1")


def _place(topology):
    found = hardware.devices_of(topology)
    if found.missing:
        pytest.skip(f"needs {found.missing.value}")
    one = mesh.make_mesh(1, 1, found.devices)
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        yield jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())


@pytest.fixture
def only(monkeypatch):
    """Return a function that restricts the table of kernels to some rows or names, for the CPU."""
    from structvit_jax.ops import kernels

    named = {row.name: row for row in reversed(kernels.TABLE)}

    def use(*rows):
        rows = (named[row] if isinstance(row, str) else row for row in rows)
        table = tuple(row._replace(platform="cpu", supports=lambda *args, **options: True) for row in rows)
        monkeypatch.setattr(kernels, "TABLE", table)

    return use


@pytest.fixture
def x64():
    """Enable double precision for one test."""
    with jax.enable_x64(True):
        yield


def structvit(*arguments):
    """Run `structvit ARGUMENTS` in this process; return its exit code."""
    return cli.call(cli.structvit, list(map(str, arguments)))


class Command:
    """A command that runs in a fork of a server that has imported the package, which saves four seconds.

    Args:
      folder: for its output.
      arguments: the command line.
      program: the subcommand of `structvit`; "" runs `python -m structvit_jax.main`.
      first: called in the new process before the command.
      environment: variables to set.
    """

    _server = multiprocessing.get_context("forkserver")
    _modules = (
        *("cli.configuration", "cli.experiment", "data.dataset", "training.loop", "performance.bench"),
        *("performance.estimate", "analysis.batch_preview"),
    )
    _server.set_forkserver_preload([*map("structvit_jax.{}".format, _modules), "sklearn.datasets"])

    def __init__(self, folder, *arguments, program="", first=None, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        for path in (self._out, self._err):  # of an earlier command
            path.unlink(missing_ok=True)
        given = program.split(), list(map(str, arguments)), self._out, self._err, first, environment
        self.process = self._server.Process(target=_command, args=given)
        self.process.start()

    @property
    def stdout(self):
        """The output so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def stderr(self):
        return self._err.read_text() if self._err.exists() else ""

    @property
    def alive(self):
        return self.process.is_alive()

    @property
    def returncode(self):
        return self.process.exitcode

    def wait(self):
        self.process.join(300)
        return self

    def end(self, seconds):
        """Wait for at most this time and return the exit code, or None if the command is still running."""
        self.process.join(seconds)
        return self.returncode

    def signal(self, number):
        """Send a signal to the command, which must be running."""
        assert self.process.is_alive(), self.stdout + self.stderr
        os.kill(self.process.pid, number)

    def when(self, happens, seconds=120):
        """Wait until `happens()` is true; the command must keep running."""
        deadline = time.monotonic() + seconds
        while not happens():
            assert self.process.is_alive() and time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.002)


def devices(count):
    """Return the environment of a command on `count` fake devices."""
    return {"XLA_FLAGS": f"{COMPILER} --xla_force_host_platform_device_count={count}"}


def processes(folder, *arguments, first=(None, None), more=((), ())):
    """Start a run of two processes with four devices each; `more` are additional arguments of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"} | devices(4)
    return [
        Command(folder / str(i), *arguments, *more[i], first=first[i], **variables, JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]


def _command(program, arguments, out, err, first, environment):
    """Run a command in the forked process."""
    gc.set_threshold(*_GC_THRESHOLDS)
    os.chdir(ROOT)
    os.environ.update({"XLA_FLAGS": COMPILER} | environment)
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, err)):
        stream.flush()
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout = out.open("w")  # not the file descriptor, to which threads of JAX's transport print
    sys.argv = ["structvit", *program, *arguments]
    if first:
        first()
    if program:
        cli.main()
    main.main()


@pytest.fixture
def command(tmp_path_factory):
    """Return a function that runs a `Command` to its end."""

    def run_to_end(*arguments, **options):
        return Command(tmp_path_factory.mktemp("command"), *arguments, **options).wait()

    return run_to_end


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The workdir and the output of a complete run, which all workers of pytest share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished"
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        process = Command(folder, *QUICK, f"--workdir={folder / 'run'}").wait()
        (folder / "exit").write_text(process.stderr or "0")
    deadline = time.monotonic() + 300
    while not (folder / "exit").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (folder / "exit").read_text() == "0"
    return folder / "run", (folder / "stdout").read_text()


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the complete run."""
    return shutil.copytree(finished[0], tmp_path / "run")


def same_as(finished, workdir):
    """Return whether a run has the results of the complete run."""
    return all((workdir / name).read_bytes() == (finished[0] / name).read_bytes() for name in SAME)


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, monkeypatch):
    """A workdir on disk, and one in a bucket."""
    if request.param == "disk":
        yield epath.Path(tmp_path)
        return
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    with Bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(lock, "_SETTLE", dict.fromkeys((True, False), 0.1))
        yield epath.Path(f"gs://bucket/{tmp_path.name}")  # a new name, because etils caches listings
        fsspec.get_filesystem_class("gs").clear_instance_cache()


def slowly(seconds):
    """For `first` of a command: delay every training batch and print a line for it."""
    batches = ConfiguredDataset.train_batches

    def slow(self, *arguments, **options):
        for batch in batches(self, *arguments, **options):
            print("a slow batch", flush=True)
            time.sleep(seconds)
            yield batch

    ConfiguredDataset.train_batches = slow


def contents(folder):
    """Return the contents of all files below a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(workdir):
    """Return the lines of metrics.jsonl, parsed as strict JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def refusal(process):
    """Return the one line of a command that failed with an error of the user."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("error: ") and len(line) < 600
    return line


@pytest.fixture
def refused(command):
    """Return a function that runs a command that must fail, and returns its line of error."""
    return lambda *arguments, **options: refusal(command(*arguments, **options))
