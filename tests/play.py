"""Run the scripts of launch/ with fake commands of the cloud and a fake program."""

import os
import subprocess
import time
from pathlib import Path

from conftest import ROOT

LAUNCH, DATA = ROOT / "launch", ROOT / "tests" / "fixtures" / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())
MAIN = "structvit_jax.main"
RUN = ["--config=configs/digits.py", "--workdir=gs://bucket/run", "--config.train.note=two words"]


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


class Play:
    """A folder with fake commands on PATH. The file `exits` controls the program; others record its calls."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.exits("0")
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PLAY": str(folder),
            "PYTHON": str(DATA / "program.sh"),
            "LOCAL_POLL_SECONDS": "0.05",
            "LOCAL_GRACE_SECONDS": "1",
            "TPU_RUN_POLL_SECONDS": "0.05",
            "TPU_RUN_TRIES": "4",
            "TPU_WORKER_PATIENCE": "2",
        }

    def exits(self, *does, process=None):
        name = "exits" if process is None else f"exits-{process}"
        (self.folder / name).write_text("\n".join(does) + "\n")

    def started(self, process=0):
        """Return (arguments, environment) of each start of a process."""
        path = self.folder / f"started-{process}"
        lines = path.read_text().splitlines() if path.exists() else []
        environments = [dict(word.split("=", 1) for word in line.split()) for line in lines[1::2]]
        return list(zip(lines[::2], environments, strict=True))

    def start(self, *command, **environment):
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command, **environment):
        with self.start(*command, **environment) as process:
            process.stdout, process.stderr = map(Text, process.communicate(timeout=60))
        return process

    def nothing_is_left(self):
        pids = (self.folder / "pids").read_text().split()
        return wait_for(lambda: not any(alive(pid) for pid in pids))


class Text(str):
    """The output of a process, in place of its stream, which Popen closes at the end."""

    def close(self):
        pass


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def refused(process, says):
    """Check that a process printed one line of error that contains `says`, and exited with code 2."""
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ") and says in line
    assert not process.stdout
