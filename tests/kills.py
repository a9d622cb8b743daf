"""Kills runs, again and again, and compares how they end with runs that nobody killed.

    python tests/kills.py [--kills 50] [--minutes 40] [--seed 0] [--layouts]

SIGKILL and SIGTERM, at random moments and during saves, in runs of one process and in either process of
runs of two. Every run is started again with the same command until it is complete, and has to end with the
result.json (params_sha256 included) and the metrics.jsonl of an uninterrupted run. With --layouts runs of two
processes are compared with one process, for every way to lay out eight devices, in their losses and, trained
to the end, in their accuracy. Exits with 1 on any difference.
"""

import argparse
import collections
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import CONFIG, Command, devices, processes, records, slowly

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
PATIENCE = 90  # seconds for a process to end after another was killed, or itself was told to
KINDS = [  # processes, signal, when; the more often a kind is listed, the more of it
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
SLOWLY = functools.partial(slowly, 0.05)


def start(folder, count, workdir, arguments=RUN, first=SLOWLY, layout=()):
    """The processes of a run; `count` of them share eight devices, or one has one."""
    arguments = [*arguments, *layout, f"--workdir={workdir}"]
    if count == 2:
        return processes(folder, *arguments, first=(first, first))
    return [Command(folder / "0", *arguments, first=first, **devices(8 if layout else 1))]


def wait(run, seconds=None):
    """Exit codes; None of a process that did not end and was killed for that."""
    deadline = time.monotonic() + (seconds or 1200)
    for command in run:
        command.process.join(max(0.0, deadline - time.monotonic()))
    codes = [command.returncode for command in run]
    for command in run:
        command.process.kill()
        command.process.join()
    return codes


def kill(run, workdir, number, when, chance):
    """Sends a signal to one of a run's processes; returns which, or None if the run was complete before."""
    victim = chance.randrange(len(run))
    phase, delay = chance.choice(("devices:", "compiled in", "compiled in")), chance.uniform(0, 2.5)

    def saving():  # what an earlier kill left is gone when this run compiles
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
    os.kill(run[victim].process.pid, number)
    return victim


def outcome(workdir):
    """What has to be equal, by file."""
    return {name: (workdir / name).read_bytes() for name in ("result.json", "metrics.jsonl")}


def expected(codes, number, victim):
    """Whether the processes ended as they should: a run may also have been complete, or not yet listening."""
    if number == signal.SIGTERM:
        return set(codes) in ({75}, {0}, {-signal.SIGTERM})
    return all(code == (-number if i == victim else 75) for i, code in enumerate(codes))


class Harness:
    def __init__(self, folder, kills, minutes, seed):
        self.folder, self.kills, self.chance = folder, kills, random.Random(seed)
        self.deadline = time.monotonic() + 60 * minutes
        self.counts = collections.defaultdict(collections.Counter)
        self.problems = []
        self.references = {}

    def problem(self, text):
        self.problems.append(text)
        print(f"PROBLEM: {text}", flush=True)

    def reference(self, count):
        """How an uninterrupted run of so many processes ends."""
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
        """One run from nothing to its end, killed a few times on the way."""
        count = self.chance.choice(KINDS)[0]
        kinds = [kind for kind in KINDS if kind[0] == count]
        same, workdir = self.reference(count), self.folder / f"run-{number}"
        for _ in range(self.chance.randint(2, 6)):
            _, sent, when = kind = self.chance.choice(kinds)
            run = start(self.folder / "output", count, workdir)
            victim = kill(run, workdir, sent, when, self.chance)
            codes = wait(run, PATIENCE)
            if victim is None:
                self.counts[kind]["too late"] += 1
                if any(codes):
                    self.problem(f"run {number}: {codes} by itself: {run[0].stderr[-500:]}")
                break
            self.counts[kind]["kills"] += 1
            self.counts[kind][f"of process {victim}"] += 1
            print(
                f"run {number}: {describe(kind)}, process {victim}: exit codes {codes}, "
                f"{self.done()} of {self.kills}",
                flush=True,
            )
            if not expected(codes, sent, victim):
                errors = "".join(command.stderr[-500:] for command in run)
                self.problem(f"run {number}: {describe(kind)}: exit codes {codes}: {errors}")
        run = start(self.folder / "output", count, workdir)
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
        print(f"\n{'processes, signal, when':36} kills  of process 0  of process 1  too late")
        for kind in sorted(self.counts, key=describe):
            counter = self.counts[kind]
            columns = (counter[name] for name in ("kills", "of process 0", "of process 1", "too late"))
            print("{:36} {:5} {:13} {:13} {:9}".format(describe(kind), *columns))
        print(f"{'all':36} {self.done():5}\n\n{runs} runs, {len(self.problems)} problems")
        if self.done() < self.kills:
            self.problem(f"only {self.done()} of {self.kills} kills in the time given")


def describe(kind):
    count, number, when = kind
    return f"{count} x {signal.Signals(number).name} {when}"


def compare_layouts(folder):
    """What differs between one process and two, a line each."""
    problems = []
    for data, fsdp in LAYOUTS:
        layout = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"]
        ends = []
        for count in (1, 2):
            workdir = folder / f"layout-{data}-{fsdp}-{count}"
            run = start(folder / "output", count, workdir, FULL, None, layout)
            if any(wait(run)):
                sys.exit(f"{layout}, {count} processes: {run[0].stdout}{run[0].stderr}")
            losses = [line["loss"] for line in records(workdir) if "loss" in line]
            ends.append((np.array(losses[:10]), json.loads((workdir / "result.json").read_text())["top1"]))
        (one, top1), (two, other) = ends
        difference = float(np.max(np.abs(two / one - 1)))
        print(
            f"data {data} x fsdp {fsdp}: losses of 10 steps within {difference:.1e}, top1 {top1:.4f} in one"
            f" process and {other:.4f} in two",
            flush=True,
        )
        if difference > 1e-5 or abs(top1 - other) > 0.01:
            problems.append(f"data {data} x fsdp {fsdp} differs")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", action="store_true", help="compare one process with two as well")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        print(f"seed {options.seed}", flush=True)
        harness = Harness(Path(folder), options.kills, options.minutes, options.seed)
        harness.run()
        problems = harness.problems + (compare_layouts(Path(folder)) if options.layouts else [])
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    print("\n".join(problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
