"""Nothing that is printed is shortened to fit: not a figure, not a version, not a line of progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer import terminal
from trainer.progress import progress

FIGURES = ("before", "1.1", "0.9–1.3", "10.073", "10.016–10.1234")


def test_output_that_is_no_terminal_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    written = terminal.console()
    with written.capture() as captured:
        written.print("A sentence that is longer than twenty columns.")
    assert captured.get() == "A sentence that is longer than twenty columns.\n"


def test_a_narrow_terminal_breaks_figures_and_shortens_none() -> None:
    shown = terminal.table("Model", "Score", "95 % interval", "Loss", "95 % interval", figures=True)
    shown.add_row(*FIGURES)
    file = io.StringIO()
    Console(file=file, width=44, force_terminal=True, color_system=None).print(shown)
    assert "…" not in file.getvalue()
    assert sorted(filter(str.isdigit, file.getvalue())) == sorted(
        filter(str.isdigit, "95" * 2 + "".join(FIGURES))
    )


def test_a_line_of_progress_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with progress("training", 2) as advance:
        advance(2, "loss 171.4016, evaluation loss 171.8968, 4464 tokens/s")
    assert capsys.readouterr().err.endswith("evaluation loss 171.8968, 4464 tokens/s\n")
