"""One page that refers to nothing outside of it, says what stands in, and holds table and picture."""

from __future__ import annotations

import re
from pathlib import Path

from tests.trainer.studies.pretend import Local, right, studied_run, study_of
from trainer.runs import read_json
from trainer.statistics.scores import Interval
from trainer.studies import pictures, report
from trainer.studies.report import Outcome, Picture, Table
from trainer.studies.study import Study

SCORES = [Interval(0.5, 0.4, 0.6), Interval(0.9, 0.8, 1.0)]


def outcome() -> Outcome:
    svg = pictures.intervals("Score", ["one <b>", "two"], [pictures.Series("base", SCORES)])
    return Outcome(
        title="Score by <something>",
        finding="It helps & hurts.",
        table=Table(("Name", "Score"), [["one <b>", "50.0"], ["two", "90.0"]], marked="two"),
        meaning={"Score": "What it means."},
        pictures=[Picture(svg, "A caption.")],
        notes=["A note."],
        more={"More": Table(("Step", "USD"), [["first", "0.10"]])},
        figures={"two": 0.9},
    )


def page_of(study: Study) -> str:
    return report.write(study, outcome(), 12).read_text(encoding="utf-8")


def test_the_page_is_complete_and_self_contained(tmp_path: Path) -> None:
    page = page_of(study_of(studied_run(tmp_path), "demos", Local(right)))
    assert page.lstrip().startswith("<!doctype html>")
    for text in ("It helps &amp; hurts.", "one &lt;b&gt;", "A note.", "A caption.", "What it means.", "More"):
        assert text in page
    assert "<svg" in page and "var(--ink)" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.findall(r"url\((?!#)|@import|<script|<link", page)
    assert '<tr class="ours"><th scope="row">two' in page


def test_stand_ins_are_named_first(tmp_path: Path) -> None:
    page = page_of(study_of(studied_run(tmp_path), "demos", Local(right)))
    body = page.partition("<body>")[2]
    assert body.index("The teacher is a stand-in") < body.index("<h1>")
    assert body.index("very small model (3 MB)") < body.index("<h1>")
    assert "openai/pretend (stand-in)" in body


def test_a_real_teacher_is_no_stand_in(tmp_path: Path) -> None:
    teacher = {"model": "openai/pretend", "price_per_1m": {"input": 1, "output": 2}}
    study = study_of(studied_run(tmp_path, teacher=teacher), "demos", Local(right))
    assert not any("stand-in" in notice for notice in report.notices(study))


def test_the_same_figures_stand_in_json_and_on_the_terminal(tmp_path: Path) -> None:
    study = study_of(studied_run(tmp_path), "demos", Local(right), context=999)
    page_of(study)
    found = read_json(study.folder / "result.json")
    assert found["figures"] == {"two": 0.9}
    assert found["tables"]["main"]["rows"] == [["one <b>", "50.0"], ["two", "90.0"]]
    assert found["about"]["context"] == "999 tokens"
    tables = report.terminal(outcome())
    assert [table.row_count for table in tables] == [2, 1]


def test_a_curve_has_room_for_missing_values() -> None:
    svg = pictures.curves("Score", [0, 1], [pictures.Series("base", [None, SCORES[0]])], "k")
    assert svg.startswith("<svg") and "base" in svg
