"""Drop privileges of a process that root started: functions for the field `first` of a case."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # capabilities that bypass file modes
_KEEPCAPS = 8  # PR_SET_KEEPCAPS
_NOBODY = 12345  # a user id without a name


def without_privileges() -> None:
    """Make file modes apply to root, too."""
    if os.geteuid() == 0:
        _set_capabilities(_held() & ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH))


def without_a_name() -> None:
    """Become a user without a name, as in containers, who may still read and write every file."""
    if os.geteuid() == 0:
        held = _held()
        ctypes.CDLL(None).prctl(_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
        _set_capabilities(held & (1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH))


def _held() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("CapPrm:")), 16)


def _set_capabilities(held: int) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low, high = held & 0xFFFFFFFF, held >> 32
    values = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)  # effective, permitted, inheritable, twice
    if ctypes.CDLL(None, use_errno=True).capset(header, values):
        raise OSError(ctypes.get_errno(), "capset")
