"""A sample of the attacks of `make hostile`, and a check that its program notices what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("what", ["--self", "--sample"])
def test_attacks(what):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    process = subprocess.run(
        [sys.executable, "tests/hostile.py", what, "--jobs=1"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
