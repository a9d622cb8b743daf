"""Misbehave in a way that the harness has to detect: python -m attacks.misbehave HOW."""

import os
import subprocess
import sys
import time
from pathlib import Path


def traceback():
    raise RuntimeError("unexpected")


def hang():
    time.sleep(1000)


def memory():
    grown = bytearray()
    while True:
        grown += b"x" * 2**24
        time.sleep(0.01)


def memory_of_a_child():
    subprocess.run([sys.executable, "-m", "attacks.misbehave", "memory"], check=True)


def lines():
    print("error: one\nerror: two", file=sys.stderr)
    sys.exit(2)


def escapes():
    print("\x1b[31mred")


def exit_code():
    sys.exit(3)


def stray():
    Path(sys.argv[2], "stray").touch()


def temporary():
    Path(os.environ["TMPDIR"], "left").touch()


def survivor():
    subprocess.Popen(["sleep", "1000"])


def connect():
    import socket

    socket.create_connection((sys.argv[2].split(":")[0], int(sys.argv[2].split(":")[1]))).close()


def well():
    print("note: nothing is wrong", file=sys.stderr)


def refusal():
    print("error: a file is missing; give another", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
