"""A sample of the attacks of `make hostile`, and a check that its harness detects misbehaving commands."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_a_sample_of_attacks_and_the_harness():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    both = [
        subprocess.Popen(
            [sys.executable, "tests/tools/hostile.py", option, "--jobs=1"],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for option in ("--self", "--sample")  # in parallel: the first mostly waits
    ]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
