"""A sample of the attacks of `make hostile`, and a check that its program notices what it should."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_attacks():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    both = [
        subprocess.Popen(
            [sys.executable, "tests/tools/hostile.py", what, "--jobs=1"],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for what in ("--self", "--sample")  # at once: the first waits most of the time
    ]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
