"""A long copy says how far it is, not too often, and guesses only when it has something to go by."""

from __future__ import annotations

import io

from trainer.bundle.meter import Meter


def test_lines_come_now_and_then_with_what_is_left() -> None:
    now, out = 0.0, io.StringIO()
    meter = Meter("copying", 1_000_000_000, out, lambda: now)
    for step in range(1, 11):
        now = float(step)
        meter.add(1_000_000 if step < 6 else 99_000_000)
    assert out.getvalue().splitlines() == [
        "copying: 5 of 1000 MB",
        "copying: 500 of 1000 MB, about 10 s left",
    ]
