"""How far a long copy is, on standard error, with Python's standard library alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

LINE_S = 5.0
MB = 1e6
ENOUGH = 0.02
"""Share that must be done before what is left is worth guessing: an engine thinks before it saves an image."""


class Meter:
    """Says now and then how many of `total` bytes are done, and how long the rest will take."""

    def __init__(
        self, name: str, total: int, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._total, self._clock = name, total, clock
        self._out = out or sys.stderr
        self._done = 0
        self._started = self._last = clock()

    def add(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if now - self._last >= LINE_S:
            self._last = now
            text = f"{self._name}: {self._done / MB:.0f} of {self._total / MB:.0f} MB"
            if self._done >= ENOUGH * self._total:
                left = (now - self._started) * max(self._total / max(self._done, 1) - 1, 0)
                text += f", about {left:.0f} s left"
            self._out.write(text + "\n")
            self._out.flush()
