"""Kills training runs at random moments, and checks that each ends as if nothing had been.

    python tests/kills.py [--kills 50] [--minutes 40] [--seed 0] [--layouts]

Every run is started again with the same command until it is complete; then its parameters, metrics and
result have to be those of the uninterrupted run on the same layout, byte for byte. Moments are random, some
of them while a checkpoint is being saved; a third of the runs has two processes, of which either is killed.
--layouts compares two processes of four fake devices with one of eight instead, for all of data x fsdp.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN = [
    "--config=configs/moving_digits.py",
    "--config.model.name=structvit_tiny_2_1_video",
    "--config.model.depths=(1,1,1,1)",
    "--config.model.widths=(8,16,16,16)",
    "--config.model.drop_path=0.2",
    "--config.data.batch_size=16",
    "--config.data.train_examples=160",
    "--config.data.test_examples=32",
    "--config.eval.batch_size=32",
    "--config.eval.every=20 steps",
    "--config.train.duration=60 steps",
    "--config.checkpoint.every=4 steps",
    "--config.mesh.heartbeat=5",
]
FILES = ("result.json", "metrics.jsonl")


def start(workdir, log, processes, *options):
    """One process, or several under launch/local.sh."""
    arguments = [*RUN, f"--workdir={workdir}", *options]
    command = [sys.executable, "-m", "structvit_jax.main"]
    if processes > 1:
        command = ["launch/local.sh", f"--processes={processes}", "--cpu-devices=2", f"--logs={log}.d", "--"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, "LOCAL_POLL_SECONDS": "0.2"}
    with open(log, "a") as file:
        streams = {"stdout": file, "stderr": file}
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, **streams)


def members(workdir):
    """The program's processes in this workdir, by their numbers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--workdir={workdir}".encode() in words and b"structvit_jax.main" in words:
            number = next((v for v in variables if v.startswith(b"JAX_PROCESS_ID=")), b"=0").split(b"=")[1]
            found[int(number)] = int(folder.name)
    return found


def kill_once(rng, workdir, process, processes, span, counts):
    """Waits for a random moment, or for a save, and kills; returns whether it came in time."""
    number, during_save = rng.choice((signal.SIGKILL, signal.SIGTERM)), rng.random() < 0.4
    victim = rng.randrange(processes)
    deadline = time.monotonic() + rng.uniform(0, span)
    checkpoints = workdir / "checkpoints"
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if during_save:
        while process.poll() is None and not list(checkpoints.glob("*orbax-checkpoint-tmp*")):
            time.sleep(0.001)
    pids = members(workdir)
    if process.poll() is not None or victim not in pids:
        return False
    saving = bool(list(checkpoints.glob("*orbax-checkpoint-tmp*")))
    try:
        os.kill(pids[victim], number)
    except ProcessLookupError:
        return False
    of = f" of process {victim} of {processes}" if processes > 1 else ""
    counts[f"{number.name}{of}{', while saving' if saving else ''}"] += 1
    process.wait(timeout=120)
    return True


def finish(process, log):
    code = process.wait(timeout=300)
    if code != 0:
        raise SystemExit(f"a run that nobody killed ended with {code}:\n{log.read_text()[-3000:]}")


def kills(arguments, folder):
    """The harness; returns the exit code."""
    rng, counts, started = random.Random(arguments.seed), collections.Counter(), time.monotonic()
    reference, span = {}, {}
    for processes in (1, 2):
        workdir, log = folder / f"whole_{processes}", folder / f"whole_{processes}.log"
        for _ in range(2):  # the second time without compiling
            shutil.rmtree(workdir, ignore_errors=True)
            since = time.monotonic()
            finish(start(workdir, log, processes), log)
        span[processes] = time.monotonic() - since
        reference[processes] = [(workdir / name).read_bytes() for name in FILES]
        print(f"uninterrupted, processes: {processes}, {span[processes]:.0f} s", flush=True)
    different = runs = 0
    while sum(counts.values()) < arguments.kills and time.monotonic() - started < 60 * arguments.minutes:
        processes = 2 if runs % 3 == 2 else 1
        workdir, log = folder / f"run_{runs}", folder / f"run_{runs}.log"
        for _ in range(rng.randint(1, 4)):
            process = start(workdir, log, processes)
            if not kill_once(rng, workdir, process, processes, span[processes], counts):
                process.wait(timeout=300)
                break
        finish(start(workdir, log, processes), log)
        same = [(workdir / name).read_bytes() for name in FILES] == reference[processes]
        different += not same
        digest = json.loads((workdir / "result.json").read_text())["params_sha256"][:12]
        print(
            f"run {runs}: {digest} {'as uninterrupted' if same else 'DIFFERENT, see ' + str(workdir)};"
            f" {sum(counts.values())} kills in all, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        runs += 1
    print(f"\n{runs} runs, {sum(counts.values())} kills, {different} runs that ended otherwise")
    for kind, count in sorted(counts.items()):
        print(f"  {count:3}  {kind}")
    return int(different > 0 or sum(counts.values()) < arguments.kills)


def layouts(folder):
    """Two processes of four devices against one of eight, for all of data x fsdp."""
    failed = 0
    long = ["--config.train.duration=400 steps", "--config.checkpoint.every=", "--config.eval.every="]
    long += ["--config.data.train_examples=6400", "--config.data.test_examples=512"]
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    alone = folder / "alone"
    finish(start(alone, folder / "alone.log", 1, *long), folder / "alone.log")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    for fsdp in (1, 2, 4, 8):
        workdir, log = folder / f"fsdp_{fsdp}", folder / f"fsdp_{fsdp}.log"
        command = ["launch/local.sh", "--processes=2", "--cpu-devices=4", f"--logs={log}.d", "--"]
        command += [*RUN, *long, f"--workdir={workdir}", f"--config.mesh.fsdp={fsdp}"]
        environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": ""}
        with open(log, "w") as file:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)
        both = [
            [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            for path in (alone, workdir)
        ]
        first = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(both[0][:10], both[1][:10], strict=True))
        tops = [json.loads((path / "result.json").read_text())["top1"] for path in (alone, workdir)]
        good = first < 1e-5 and abs(tops[0] - tops[1]) <= 0.01
        failed += not good
        verdict = "" if good else "  NOT WITHIN 1e-5 AND 0.01"
        print(
            f"data {8 // fsdp} x fsdp {fsdp}: losses of 10 steps within {first:.1e},"
            f" top1 {tops[1]:.4f} against {tops[0]:.4f}{verdict}",
            flush=True,
        )
    return int(failed > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="structvit_jax_kills_"))
    print(f"logs and workdirs: {folder}", flush=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    sys.exit(layouts(folder) if arguments.layouts else kills(arguments, folder))


if __name__ == "__main__":
    main()
