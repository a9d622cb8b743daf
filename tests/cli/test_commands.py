"""Commands whose output cannot be written, or that get a signal, print at most one line."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

NOTHING = "stopped by a signal with nothing to save; re-run the command to resume\n"
BODY = "import sys; from structvit_jax.runtime.process import exit_in_one_line\nwith exit_in_one_line():\n  "
FULL = (
    "error: standard output cannot be written: No space left on device; redirect it and re-run the command\n"
)


def python(body, stdout, **environment):
    environment = os.environ | environment
    command = [sys.executable, "-c", BODY + body]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x'); sys.exit(0)"])
def test_output_to_a_full_disk(body, unbuffered):
    with open("/dev/full", "w") as full:
        process = python(body, full, PYTHONUNBUFFERED=unbuffered)
    assert (process.returncode, process.stderr) == (2, FULL)


def test_output_to_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        process = python("print('x')", pipe)
    assert (process.returncode, process.stderr) == (1, "")


def test_output_with_characters_that_the_encoding_lacks():
    process = python("print('caf\\xe9 \\udce9')", subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (process.returncode, process.stdout, process.stderr) == (0, "caf\\xe9 \\udce9\n", "")


def test_closed_output():
    script = f'exec "{sys.executable}" -c "$1" >&-'
    command = ["sh", "-c", script, "sh", BODY + "print('x')"]
    process = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "number", "code", "line"),
    [
        ("structvit_jax predict run clip.mp4", signal.SIGINT, 130, "interrupted\n"),
        ("structvit_jax prepare folder data --check", signal.SIGINT, 130, "interrupted\n"),
        ("structvit_jax train --config=digits", signal.SIGTERM, 75, NOTHING),
        ("structvit_jax.main --config=digits", signal.SIGINT, 75, NOTHING),
        ("structvit_jax.main --config=digits", signal.SIGTERM, 75, NOTHING),
        ("structvit_jax.main --config=digits", signal.SIGHUP, 75, NOTHING),
    ],
)
def test_a_signal_during_imports(tmp_path, arguments, number, code, line):
    """The command exits at once, with one line. NumPy is replaced by a module that takes long to import."""
    (tmp_path / "numpy.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    command = [sys.executable, "-m", *arguments.split()]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert (process.wait(20), process.stderr.read()) == (code, line)
