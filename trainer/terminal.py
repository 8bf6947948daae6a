"""What the commands print with: no figure is cut to fit, on a narrow terminal or where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

UNBOUNDED = 10_000
"""Columns where output goes to a file or another program, which needs no line broken for it."""


def console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr)
    if not made.is_terminal:
        made.width = UNBOUNDED
    return made


def table(*columns: str, title: str | None = None, figures: bool = False) -> Table:
    """A table whose long words are broken where there is no room, never shortened.

    Args:
        figures: every column behind the first holds figures, which stand at its right.
    """
    return Table(
        *(
            Column(name, overflow="fold", justify="right" if figures and number else "left")
            for number, name in enumerate(columns)
        ),
        title=title,
    )
