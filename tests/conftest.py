"""Tests run on the CPU, as eight fake devices of which most use one.

Those of operations also run on a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -n 4 tests/ops
"""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NO_GCE_CHECK"] = "true"  # else who opens a bucket waits for a machine of Google's
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait in loops for cores that XLA has
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":  # most programs take longer to compile than to run
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
else:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # not in TF32: rounding is what is tested
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share it

import fsspec
import jax
import jaxtyping
import pytest
from bucket import Bucket
from etils import epath

# Shapes in the annotations of models and operations are checked at every call.
_CHECKED = [f"structvit_jax.models.{name}" for name in ("blocks", "layers", "networks", "struct_attention")]
_CHECKED += [f"structvit_jax.ops.{name}" for name in ("attention", "convolution", "pointwise", "structsa")]
jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")

from structvit_jax import cli, main  # noqa: E402
from structvit_jax.data.dataset import ConfiguredDataset  # noqa: E402
from structvit_jax.performance import hardware  # noqa: E402
from structvit_jax.runtime import lock, mesh  # noqa: E402

# Tracing makes many objects that stay; by default a sixth of the time goes in looking through them.
_GARBAGE = 50_000, 10, 10
gc.set_threshold(*_GARBAGE)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would not hear Ctrl-C
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nor a job under nohup that its terminal is gone

ROOT = Path(__file__).parent.parent
# XLA's older code for CPUs: slower, but compiled in half the time. An option of one program, and of commands;
# JAX 0.11 has it no more, and its compiler would not start with an option that it does not know.
COMPILED_SOON = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
COMPILER = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if COMPILED_SOON else ""
)
os.environ["XLA_FLAGS"] += f" {COMPILER}"  # of this process, too; read when a device is first asked for
CONFIG = "--config=configs/moving_digits.py"
SAME = ("result.json", "metrics.jsonl")  # files that a kill may not change
# Seconds instead of minutes: a two-block DeiT on few clips.
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
    """Commands that tests start share what they compile."""
    cache = tmp_path_factory.getbasetemp().parent / "jax_cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture
def tpu():
    """Where programs for a TPU that is not there are placed; operations are traced for it."""
    yield from _place("v5e:1x1")


@pytest.fixture
def gpu():
    """The same for a GPU."""
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
    """Replace the table of kernels by these rows or names, for this process's CPUs."""
    from structvit_jax.ops import kernels

    named = {row.name: row for row in reversed(kernels.TABLE)}

    def use(*rows):
        rows = (named[row] if isinstance(row, str) else row for row in rows)
        table = tuple(row._replace(platform="cpu", supports=lambda *args, **options: True) for row in rows)
        monkeypatch.setattr(kernels, "TABLE", table)

    return use


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
        env=os.environ | {"XLA_FLAGS": COMPILER} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def structvit(*arguments):
    """Run `structvit ARGUMENTS` in this process; return its exit code."""
    return cli.call(cli.structvit, list(map(str, arguments)))


class Command:
    """The same, or `structvit PROGRAM`, in a fork of a process that has done its imports: a second instead of
    five.

    Its environment may be changed, and `first` is called in it before all else.
    """

    _server = multiprocessing.get_context("forkserver")
    _modules = (
        *("cli.configuration", "cli.experiment", "data.dataset", "training.loop", "performance.bench"),
        *("performance.plan", "analysis.batch_preview"),
    )
    _server.set_forkserver_preload([*map("structvit_jax.{}".format, _modules), "sklearn.datasets"])

    def __init__(self, folder, *arguments, program="", first=None, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        for path in (self._out, self._err):  # of a command before
            path.unlink(missing_ok=True)
        given = program.split(), list(map(str, arguments)), self._out, self._err, first, environment
        self.process = self._server.Process(target=_command, args=given)
        self.process.start()

    @property
    def stdout(self):
        """What it has printed so far."""
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
        """The exit code, if it ends in this time."""
        self.process.join(seconds)
        return self.returncode

    def signal(self, number):
        """Sends a signal; the command has to be running still."""
        assert self.process.is_alive(), self.stdout + self.stderr
        os.kill(self.process.pid, number)

    def when(self, happens, seconds=120):
        """Waits for `happens()` while the command runs."""
        deadline = time.monotonic() + seconds
        while not happens():
            assert self.process.is_alive() and time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.002)


def devices(count):
    """The environment of a command on so many fake devices."""
    return {"XLA_FLAGS": f"{COMPILER} --xla_force_host_platform_device_count={count}"}


def processes(folder, *arguments, first=(None, None), more=((), ())):
    """The commands of one run's two processes, of four devices each; `more` are arguments for one alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"} | devices(4)
    return [
        Command(folder / str(i), *arguments, *more[i], first=first[i], **variables, JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]


def _command(program, arguments, out, err, first, environment):
    """The body of the forked process."""
    gc.set_threshold(*_GARBAGE)
    os.chdir(ROOT)
    os.environ.update({"XLA_FLAGS": COMPILER} | environment)
    for stream, path in ((sys.stdout, os.devnull), (sys.stderr, err)):
        stream.flush()
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout = out.open("w")  # what JAX's own transport prints, from many threads at once, stays out of it
    sys.argv = ["structvit", *program, *arguments]
    if first:
        first()
    if program:
        cli.main()
    main.main()


@pytest.fixture
def command(tmp_path_factory):
    """Runs the command to its end."""

    def run_to_end(*arguments, **options):
        return Command(tmp_path_factory.mktemp("command"), *arguments, **options).wait()

    return run_to_end


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A complete run, one for all workers of pytest: its workdir and what it printed."""
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
    """Whether a run has ended as the complete one did."""
    return all((workdir / name).read_bytes() == (finished[0] / name).read_bytes() for name in SAME)


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, monkeypatch):
    """A workdir on a disk, and one in a bucket, for this process."""
    if request.param == "disk":
        yield epath.Path(tmp_path)
        return
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    with Bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(lock, "_SETTLE", dict.fromkeys((True, False), 0.1))
        yield epath.Path(f"gs://bucket/{tmp_path.name}")  # etils still has the listings of buckets before
        fsspec.get_filesystem_class("gs").clear_instance_cache()


def slowly(seconds):
    """In a command: every batch takes this long, and is told of."""
    batches = ConfiguredDataset.train_batches

    def slow(self, *arguments, **options):
        for batch in batches(self, *arguments, **options):
            print("a slow batch", flush=True)
            time.sleep(seconds)
            yield batch

    ConfiguredDataset.train_batches = slow


def contents(folder):
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(workdir):
    """The lines of metrics.jsonl, as strict JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def refusal(process):
    """The one line with which a command refused, or failed."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("error: ") and len(line) < 600
    return line


@pytest.fixture
def refused(command):
    """Runs a command that is to be refused; returns the line."""
    return lambda *arguments, **options: refusal(command(*arguments, **options))
