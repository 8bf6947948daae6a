"""Progress with ETA on standard error: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_LINE_S = 10.0

Advance = Callable[..., None]
"""`advance(steps=1, note="")`: so many more are done; the note stands behind the bar."""


@contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show how far `name` is, from `done` of `total` on."""
    console = Console(file=sys.stderr)
    shown = _bar(console, name, total, done) if console.is_terminal else _lines(console, name, total, done)
    with shown as advance:
        yield advance


@contextmanager
def _bar(console: Console, name: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{name:<10}", total=total, completed=done, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=note)


@contextmanager
def _lines(console: Console, name: str, total: int, done: int) -> Iterator[Advance]:
    started, last, count = time.monotonic(), time.monotonic(), done

    def advance(steps: float = 1, note: str = "") -> None:
        nonlocal last, count
        count += int(steps)
        now = time.monotonic()
        if now - last < QUIET_LINE_S and count < total:
            return
        last = now
        left = (now - started) / max(count - done, 1) * (total - count)
        console.print(
            f"{name}: {count}/{total}, {now - started:.0f} s so far, about {left:.0f} s left{f', {note}' if note else ''}",
            highlight=False,
            soft_wrap=True,
        )

    yield advance
