"""What was answered is never asked again, and a line cut by a kill is."""

from __future__ import annotations

from pathlib import Path

from trainer.studies.rows import Rows


def test_rows_are_found_again_by_system_and_example(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "deep" / "rows.jsonl")
    rows.add({"system": "one", "example": "a", "score": 1.0})
    rows.add({"system": "two", "example": "a", "score": 0.0})
    again = Rows(tmp_path / "deep" / "rows.jsonl")
    assert again.of("one") == {"a": {"system": "one", "example": "a", "score": 1.0}}
    assert again.of("two")["a"]["score"] == 0.0
    assert again.of("three") == {}


def test_a_line_that_a_kill_cut_off_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Rows(file).add({"system": "one", "example": "a", "text": "ä\u2028b"})
    with open(file, "a", encoding="utf-8") as cut:
        cut.write('{"system": "one", "exam')
    again = Rows(file)
    assert set(again.of("one")) == {"a"}
    again.add({"system": "one", "example": "b"})
    assert set(Rows(file).of("one")) == {"a", "b"}


def test_a_caller_cannot_change_what_is_stored(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add({"system": "one", "example": "a"})
    rows.of("one").clear()
    assert set(rows.of("one")) == {"a"}
