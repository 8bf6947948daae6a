"""A study's outcome: its table on the terminal, and one HTML file with table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from trainer.runs import read_json, write_json, write_text
from trainer.statistics.scores import Interval
from trainer.studies.study import SMALL_BYTES, Study
from trainer.terminal import table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

STAND_IN = (
    "The teacher is a stand-in, not a real API model: these figures show that the study works, "
    "not what a real teacher would bring."
)
SMALL = (
    "The base is a very small model ({size:.0f} MB), no general language model: how it reacts to demonstrations, "
    "instructions and other prompts says little about a published base."
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading. The first column names the row; the others are figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: str = ""
    """The first cell of the row to stress."""


@dataclass(frozen=True)
class Picture:
    """Our own SVG, and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    title: str
    finding: str
    """One sentence."""
    table: Table
    meaning: Mapping[str, str]
    """What each row, column or figure means, exactly."""
    pictures: Sequence[Picture]
    notes: Sequence[str] = ()
    more: Mapping[str, Table] = field(default_factory=dict)
    """Further tables by their headings."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same figures for programs, as JSON holds them."""


def percent(interval: Interval) -> tuple[str, str]:
    """Mean and interval of a score, in percent."""
    return f"{100 * interval.mean:.1f}", f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def points(interval: Interval) -> str:
    """A difference of scores in points, with its interval."""
    return f"{100 * interval.mean:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def notices(study: Study) -> list[str]:
    """What stands in for the real thing."""
    found = [STAND_IN] if study.run.task.settings.teacher.stand_in else []
    file = study.run.folder / "export" / "summary.json"
    size = (read_json(file)["base"] if file.is_file() else {}).get("bytes", SMALL_BYTES)
    return found + ([SMALL.format(size=size / 1e6)] if size < SMALL_BYTES else [])


def facts(study: Study, examples: int) -> dict[str, str]:
    """What was measured, on what."""
    settings, registered = study.run.task.settings, study.run.folder / "register" / "registration.json"
    stand_in = " (stand-in)" if settings.teacher.stand_in else ""
    about = {
        "task": settings.name,
        "run": study.run.name,
        "teacher": settings.teacher.model + stand_in,
        "base": settings.student.base,
        "method": f"{settings.student.method}, {settings.student.quantize}",
        "seed": str(settings.seed),
        "examples": f"{examples:,}",
        "Homestill": version("homestill"),
    }
    if registered.is_file():
        found = read_json(registered)
        about |= {
            "runtime": found["model"]["runtime"],
            "context": f"{study.context or found['model']['context']} tokens",
            "student's SHA-256": found["model"]["sha256"],
            "base's SHA-256": found["base"]["sha256"],
        }
    return about


def write(study: Study, outcome: Outcome, examples: int) -> Path:
    """Write report.html and result.json into the study's folder; returns the page's path."""
    page = study.folder / "report.html"
    about = facts(study, examples)
    write_text(page, render(study, outcome, about))
    found = {"study": study.name, "finding": outcome.finding, "notices": notices(study), "about": about}
    write_json(study.folder / "result.json", found | {"figures": outcome.figures, **_tables(outcome)})
    return page


def render(study: Study, outcome: Outcome, about: Mapping[str, str]) -> str:
    """The page: one file that refers to nothing outside of it."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("trainer.studies").joinpath("study.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        o=outcome,
        about=about,
        notices=notices(study),
        name=study.name,
        style=Markup(_style_sheet()),
        pictures=[{"svg": Markup(picture.svg), "caption": picture.caption} for picture in outcome.pictures],
    )


def terminal(outcome: Outcome) -> list[RichTable]:
    """The tables as the terminal shows them."""
    from rich.markup import escape

    shown = []
    for title, found in {outcome.title: outcome.table, **outcome.more}.items():
        made = table(*map(escape, found.columns), title=escape(title), figures=True)
        for row in found.rows:
            made.add_row(
                *(escape(cell) for cell in row), style="bold" if row[0] == found.marked and row[0] else None
            )
        shown.append(made)
    return shown


def _tables(outcome: Outcome) -> dict[str, Any]:
    return {
        "tables": {title: asdict(table) for title, table in {"main": outcome.table, **outcome.more}.items()}
    }


def _style_sheet() -> str:
    """The release report's own, so that the pages look alike."""
    page = files("trainer.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    return page.partition("<style>")[2].partition("</style>")[0]
