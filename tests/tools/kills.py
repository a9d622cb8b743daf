"""Kill runs at random moments, resume them, and compare their results with those of uninterrupted runs.

    python tests/tools/kills.py [--kills 50] [--signals 0] [--minutes 40] [--seed 0] [--layouts]

--kills: number of SIGKILL and SIGTERM signals, at random moments and during saves, to runs of one process and
to either process of runs of two. Half of the runs have data workers.

--signals: number of SIGTERM, SIGINT and SIGHUP signals to the process groups of runs with data workers,
during imports, start-up, compilation, steps, saves and evaluation. Each must end the run with exit code 75
and one line.

--layouts: for every layout of eight devices, compare runs of two processes with runs of one process: their
losses and, after training, their accuracies.

After each signal, no process of the run may be alive, and nothing may be left in shared memory or the
temporary folder. The same command is re-run until the run is complete. Then result.json (with params_sha256)
and metrics.jsonl must equal those of an uninterrupted run. Exits with 1 on any difference.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # conftest

from conftest import CONFIG, ROOT, Command, devices, processes, records, slowly

from structvit_jax.data.dataset import ConfiguredDataset
from structvit_jax.training import checkpoint
from structvit_jax.training.learner import Learner

# BatchNorm, stochastic depth, and a save every few steps.
RUN = [
    CONFIG,
    "--config.model.name=structvit_tiny_2_1_video",
    "--config.model.widths=(8,8,16,16)",
    "--config.model.head_width=8",
    "--config.model.depths=(1,1,1,1)",
    "--config.model.drop_path=0.2",
    "--config.data.batch_size=8",
    "--config.data.train_examples=40",
    "--config.data.test_examples=20",
    "--config.eval.batch_size=16",
    "--config.eval.every=15 steps",
    "--config.train.duration=40 steps",
    "--config.checkpoint.every=4 steps",
    "--config.mesh.heartbeat=5",
]
FULL = ["--config=configs/digits.py", "--config.train.duration=12 epochs", "--config.eval.every="]
LAYOUTS = (8, 1), (4, 2), (2, 4), (1, 8)
PATIENCE = 90  # seconds for a process to end after it got a signal, or after another process was killed
KINDS = [  # number of processes, signal, when; kinds that are listed twice are twice as frequent
    (1, signal.SIGKILL, "at random"),
    (1, signal.SIGKILL, "at random"),
    (1, signal.SIGKILL, "in a save"),
    (1, signal.SIGKILL, "in a save"),
    (1, signal.SIGTERM, "at random"),
    (1, signal.SIGTERM, "in a save"),
    (2, signal.SIGKILL, "at random"),
    (2, signal.SIGKILL, "in a save"),
    (2, signal.SIGTERM, "at random"),
]
STAGES = ("imports", "start-up", "compiling", "steps", "a save", "evaluation")  # in the order of a run
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SLOWLY = functools.partial(slowly, 0.05)
CLEANUP_SECONDS = 10  # for helper processes and files of a run to disappear after it has ended


def start(folder, count, workdir, arguments=RUN, first=SLOWLY, layout=()):
    """Start a run of one process with one device (eight for a layout), or of two with four devices each."""
    arguments = [*arguments, *layout, f"--workdir={workdir}"]
    if count == 2:
        return processes(folder, *arguments, first=(first, first))
    return [Command(folder / "0", *arguments, first=first, **devices(8 if layout else 1))]


class Traces:
    """Find what runs leave behind. They and their helpers are recognised by their own TMPDIR."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True)
        os.environ["TMPDIR"] = str(folder)
        self.used = set()

    def before(self, run):
        """Record the names in shared memory that a run uses, before it gets a signal."""
        pids = [str(command.process.pid) for command in run] + [pid for pid, _ in self._processes()]
        self.used = set().union(*map(mapped, pids))

    def left(self):
        """Wait for the run to be cleaned up, and return descriptions of what is left."""
        deadline = time.monotonic() + CLEANUP_SECONDS
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self):
        left = [f"process {pid}: {command}" for pid, command in self._processes()]
        left += [f"temporary {path.name}" for path in self.folder.iterdir()]
        return left + [f"shared memory {name}" for name in self.used & set(os.listdir("/dev/shm"))]

    def _processes(self):
        """Yield pid and command line of the processes with this TMPDIR: data workers and their helpers.

        A `Command` itself is a fork of a process with another TMPDIR.
        """
        mark = f"TMPDIR={self.folder}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            if process.name == str(os.getpid()):
                continue
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if "forkserver" not in command and "resource_tracker" not in command:  # of this harness
                        yield process.name, command


def mapped(pid):
    """Return the names in /dev/shm that a process has mapped."""
    with contextlib.suppress(OSError):
        return set(re.findall(r" /dev/shm/(\S+)", Path(f"/proc/{pid}/maps").read_text()))
    return set()


def grouped(slow):
    """For `first` of a command: lead a process group, and slow down everything but imports."""
    os.setpgid(0, 0)
    slowly(slow)
    batches, create, digests = ConfiguredDataset.test_batches, Learner.create, checkpoint.write_digests

    def slow_create(*arguments, **options):
        learner = create(*arguments, **options)
        time.sleep(slow)
        return learner

    def test_batches(self, *arguments, **options):
        for batch in batches(self, *arguments, **options):
            print("a slow test batch", flush=True)
            time.sleep(5 * slow)
            yield batch

    def write_digests(folder):
        print("a slow save", flush=True)
        time.sleep(5 * slow)
        digests(folder)

    ConfiguredDataset.test_batches, Learner.create = test_batches, slow_create
    checkpoint.write_digests = write_digests


class Imports:
    """A command in a new interpreter, to send a signal during its imports; has the interface of `Command`."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "structvit_jax.main", *map(str, arguments)]
        with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, process_group=0)

    @property
    def stdout(self):
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()

    @property
    def listening(self):
        """Whether its thread that listens to signals runs, which is the first thing that it starts."""
        return len(os.listdir(f"/proc/{self.process.pid}/task")) > 1

    @property
    def alive(self):
        return self.process.poll() is None

    def end(self, seconds):
        return self.process.wait(seconds)


# Text that a run prints at the beginning of a stage.
SIGNS = {
    "start-up": "devices:",
    "compiling": "compiling",
    "steps": "compiled in",
    "a save": "a slow save",
    "evaluation": "a slow test batch",
}


def reached(run, stage):
    """Return whether a run has reached a stage."""
    if stage == "imports":
        return run.listening
    return SIGNS[stage] in run.stdout


class GroupSignals:
    """Send a signal to the process group of a run with data workers in each stage, and resume the run."""

    def __init__(self, folder, count, seed, arguments=RUN, reference=None, slow=0.1, stages=STAGES):
        self.folder, self.count, self.chance = folder, count, random.Random(seed)
        self.arguments, self.same = [*arguments, "--config.data.workers=2"], reference
        self.slow, self.stages = slow, stages
        self.traces = Traces(folder / "temporary")
        self.rows, self.problems = [], []

    def run(self):
        self.same = self.same or self._complete(self.folder / "reference")
        number = 0
        while len(self.rows) < self.count:
            number += 1
            workdir = self.folder / f"signalled-{number}"
            for stage in self.stages[: self.count - len(self.rows)]:
                self._signal(stage, SIGNALS[len(self.rows) % len(SIGNALS)], workdir)
            if self._complete(workdir) != self.same:
                self.problems.append(f"signalled run {number} differs from the uninterrupted one")
        self.report(number)
        return self.problems

    def _complete(self, workdir):
        run = start(self.folder / "output", 1, workdir, self.arguments, None)
        if any(wait(run)):
            self.problems.append(f"a run failed: {run[0].stderr[-1000:]}")
        return outcome(workdir)

    def _signal(self, stage, number, workdir):
        arguments = [*self.arguments, f"--workdir={workdir}"]
        if stage == "imports":
            run = Imports(self.folder / "imports", *arguments)
        else:
            first = functools.partial(grouped, self.slow)
            run = Command(self.folder / "output" / "0", *arguments, first=first, **devices(1))
        while not reached(run, stage):
            if not run.alive:
                self.problems.append(f"a run ended before {stage}: {run.stderr[-500:]}")
                self.rows.append((stage, "none", -1, 0, 0.0, 0))
                return
            time.sleep(0.001)
        time.sleep(self.chance.uniform(0, 0.3 if stage == "imports" else self.slow))
        self.traces.before([run])
        sent = time.monotonic()
        os.killpg(run.process.pid, number)
        code = run.end(PATIENCE)
        took, left = time.monotonic() - sent, self.traces.left()
        saved = max(
            (int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0
        )
        self.rows.append((stage, signal.Signals(number).name, code, saved, took, len(left)))
        lines = run.stderr.splitlines()
        if code != 75 or left or len(lines) != 1 or not lines[0].startswith("stopped by a signal"):
            self.problems.append(f"{number} in {stage}: code {code}, left {left}, {run.stderr[-500:]}")

    def report(self, runs):
        print(f"\n{'group signal during':20} {'signal':8} exit code  last checkpoint  seconds  left behind")
        for row in self.rows:
            print("{:20} {:8} {:9} {:16} {:8.1f} {:12}".format(*row))
        print(f"\n{len(self.rows)} signals in {runs} runs, {len(self.problems)} problems", flush=True)


def wait(run, seconds=None):
    """Return the exit codes of a run; None for a process that did not end in time and was killed."""
    deadline = time.monotonic() + (seconds or 1200)
    for command in run:
        command.process.join(max(0.0, deadline - time.monotonic()))
    codes = [command.returncode for command in run]
    for command in run:
        command.process.kill()
        command.process.join()
    return codes


def kill(run, workdir, number, when, chance, traces):
    """Send a signal to a process of a run; return its number, or None if the run was complete before."""
    victim = chance.randrange(len(run))
    phase, delay = chance.choice(("devices:", "compiled in", "compiled in")), chance.uniform(0, 2.5)

    def saving():  # the remains of an earlier kill are removed before the run compiles
        saves = workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")
        return "compiled in" in run[0].stdout and any(saves)

    def happens():
        return saving() if when == "in a save" else phase in run[0].stdout

    while not happens():
        if not all(command.process.is_alive() for command in run):
            return None
        time.sleep(0.001)
    time.sleep(delay if when == "at random" else chance.uniform(0, 0.05))
    if not all(command.process.is_alive() for command in run):
        return None
    traces.before(run)
    os.kill(run[victim].process.pid, number)
    return victim


def outcome(workdir):
    """Return the contents that must be equal, by file."""
    return {name: (workdir / name).read_bytes() for name in ("result.json", "metrics.jsonl")}


def expected(codes, number, victim):
    """Return whether the exit codes are right. The run may have been complete, or not yet listening."""
    if number == signal.SIGTERM:
        return set(codes) in ({75}, {0}, {-signal.SIGTERM})
    return all(code == (-number if i == victim else 75) for i, code in enumerate(codes))


class RandomKills:
    """Kill processes of runs at random moments, resume the runs, and check their results."""

    def __init__(self, folder, kills, minutes, seed):
        self.folder, self.kills, self.chance = folder, kills, random.Random(seed)
        self.traces = Traces(folder / "temporary")
        self.deadline = time.monotonic() + 60 * minutes
        self.counts = collections.defaultdict(collections.Counter)
        self.problems = []
        self.references = {}

    def problem(self, text):
        self.problems.append(text)
        print(f"PROBLEM: {text}", flush=True)

    def reference(self, count):
        """Return the outcome of an uninterrupted run of `count` processes."""
        if count not in self.references:
            workdir = self.folder / f"reference-{count}"
            run = start(self.folder / "output", count, workdir)
            if any(wait(run)):
                sys.exit(f"the uninterrupted run failed: {run[0].stdout}{run[0].stderr}")
            self.references[count] = outcome(workdir)
        return self.references[count]

    def done(self):
        return sum(counter["kills"] for counter in self.counts.values())

    def run(self):
        number = 0
        while self.done() < self.kills and time.monotonic() < self.deadline:
            number += 1
            self.one_run(number)
            shutil.rmtree(self.folder / f"run-{number}")
        self.report(number)

    def one_run(self, number):
        """Start a run, kill and resume it a few times, complete it, and check the result."""
        count, workers = self.chance.choice(KINDS)[0], self.chance.choice((0, 2))
        arguments = [*RUN, f"--config.data.workers={workers}"]
        kinds = [kind for kind in KINDS if kind[0] == count]
        same, workdir = self.reference(count), self.folder / f"run-{number}"
        for _ in range(self.chance.randint(2, 6)):
            _, sent, when = kind = self.chance.choice(kinds)
            run = start(self.folder / "output", count, workdir, arguments)
            victim = kill(run, workdir, sent, when, self.chance, self.traces)
            codes = wait(run, PATIENCE)
            if left := self.traces.left():
                self.problem(f"run {number}: {describe(kind)} left {left}")
            if victim is None:
                self.counts[kind]["too late"] += 1
                if any(codes):
                    self.problem(f"run {number}: {codes} by itself: {run[0].stderr[-500:]}")
                break
            self.counts[kind]["kills"] += 1
            self.counts[kind][f"of process {victim}"] += 1
            self.counts[kind]["with workers"] += workers > 0
            print(
                f"run {number}: {describe(kind)}, process {victim}: exit codes {codes}, "
                f"{self.done()} of {self.kills}",
                flush=True,
            )
            if not expected(codes, sent, victim):
                errors = "".join(command.stderr[-500:] for command in run)
                self.problem(f"run {number}: {describe(kind)}: exit codes {codes}: {errors}")
        run = start(self.folder / "output", count, workdir, arguments)
        codes = wait(run)
        if any(codes):
            self.problem(f"run {number}: could not be completed: {codes}: {run[0].stderr[-1000:]}")
            return
        for name, content in outcome(workdir).items():
            if content != same[name]:
                self.problem(f"run {number}: {name} differs from the uninterrupted run's")
        names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        if names != ["36", "40"]:
            self.problem(f"run {number}: checkpoints {names} are left")

    def report(self, runs):
        names = ("kills", "of process 0", "of process 1", "with workers", "too late")
        print(f"\n{'processes, signal, when':36} " + "  ".join(names))
        for kind in sorted(self.counts, key=describe):
            columns = (self.counts[kind][name] for name in names)
            print("{:36} {:5} {:13} {:13} {:13} {:9}".format(describe(kind), *columns))
        print(f"{'all':36} {self.done():5}\n\n{runs} runs, {len(self.problems)} problems")
        if self.done() < self.kills:
            self.problem(f"only {self.done()} of {self.kills} kills in the time given")


def describe(kind):
    count, number, when = kind
    return f"{count} x {signal.Signals(number).name} {when}"


def compare_layouts(folder):
    """Compare one process with two for all layouts, and return a line for each difference."""
    problems = []
    for split, fsdp in LAYOUTS:
        layout = [f"--config.mesh.data={split}", f"--config.mesh.fsdp={fsdp}"]
        ends = []
        for count in (1, 2):
            workdir = folder / f"layout-{split}-{fsdp}-{count}"
            run = start(folder / "output", count, workdir, FULL, None, layout)
            if any(wait(run)):
                sys.exit(f"{layout}, {count} processes: {run[0].stdout}{run[0].stderr}")
            losses = [line["loss"] for line in records(workdir) if "loss" in line]
            ends.append((np.array(losses[:10]), json.loads((workdir / "result.json").read_text())["top1"]))
        (one, top1), (two, other) = ends
        difference = float(np.max(np.abs(two / one - 1)))
        print(
            f"data {split} x fsdp {fsdp}: losses of 10 steps within {difference:.1e}, top1 {top1:.4f} in one"
            f" process and {other:.4f} in two",
            flush=True,
        )
        if difference > 1e-5 or abs(top1 - other) > 0.01:
            problems.append(f"data {split} x fsdp {fsdp} differs")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", action="store_true", help="compare one process with two as well")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        print(f"seed {options.seed}", flush=True)
        problems = []
        if options.kills:
            harness = RandomKills(Path(folder) / "kills", options.kills, options.minutes, options.seed)
            harness.run()
            problems += harness.problems
        if options.signals:
            problems += GroupSignals(Path(folder) / "signals", options.signals, options.seed).run()
        problems += compare_layouts(Path(folder)) if options.layouts else []
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    print("\n".join(problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
