"""A data set whose third example kills the process that reads it. Workers import this module."""

import os
import signal

import numpy as np

from structvit_jax.data.limits import Limits
from structvit_jax.data.media import InMemoryFrames


class Deadly:
    """Five videos of one class."""

    class_names = ("a",)
    labels = np.zeros(5, int)

    def __len__(self):
        return 5

    def id(self, number):
        return f"file {number}"

    def open(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return InMemoryFrames(np.zeros((4, 8, 8, 3), np.uint8)), 0


class DeadlyLimits(Limits):
    """Limits that kill the process that opens a video of 36 pixels width."""

    def check_picture(self, width, height):
        if width == 36:
            os.kill(os.getpid(), signal.SIGKILL)
