"""From the endpoint's journal to training rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.records.entry import Entry
from serve.records.journal import Journal
from tests.trainer.test_curate import captured
from trainer import curate
from trainer.harvest import harvest, rows
from trainer.runs import Run, read_json, read_jsonl, write_json
from trainer.traces import Trace

ASKED = "about a request that no example comes near to"


def entry(identity: str, text: str = ASKED, **changes: Any) -> Entry:
    plain = Entry(
        id=identity,
        asked="words",
        messages=[{"role": "user", "content": text}],
        status=200,
        latency_ms=5.0,
        overhead_ms=0.1,
        task="words",
        predictor="sort",
        route="teacher",
        reason="low_confidence",
        model="openai/gpt-4o",
        prompt_tokens=7,
        completion_tokens=3,
        cost_usd=0.5,
        answer={"role": "assistant", "content": "[[ ## label ## ]]\nodd"},
        egress="allow",
        endpoint="chat",
    )
    return replace(plain, **changes)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    found = captured(tmp_path)
    yield found
    found.store.close()


def harvested(text: str) -> Trace:
    return Trace(
        id=text, task="words", example=text, predictor="sort", purpose="traffic", program="p", teacher="t",
        stand_in=False, messages=[{"role": "user", "content": text}], completion="odd", response={},
        prompt_tokens=1, completion_tokens=1, cost_usd=0.0, latency_ms=1.0,
    )  # fmt: skip


def journal(run: Run, *entries: Entry) -> None:
    opened = Journal(f"sqlite:///{run.home.root / 'journal.db'}")
    for each in entries:
        opened.record(each)
    opened.close()


def test_without_a_journal_there_is_nothing(run: Run) -> None:
    before = curate.inputs(run)
    assert (harvest(run.task, run.home, run.store).new, curate.inputs(run)) == (0, before)


def test_each_answer_of_the_teacher_becomes_one_row_and_costs_nothing(run: Run) -> None:
    before, spent = curate.inputs(run), run.store.spent("words")
    journal(run, entry("r1"), entry("r2", task="another"))
    first, second = harvest(run.task, run.home, run.store), harvest(run.task, run.home, run.store)
    assert (first.new, first.known, second.new, second.known) == (1, 0, 0, 1)
    assert curate.inputs(run) != before and run.store.spent("words") == spent
    curate.run(run)
    written = read_jsonl(run.folder / "curate" / "train.jsonl")
    assert [row for row in written if row["example"] == "r1"] == [
        {
            "example": "r1",
            "predictor": "sort",
            "messages": [{"role": "user", "content": ASKED}],
            "completion": "[[ ## label ## ]]\nodd",
        }
    ]
    assert read_json(run.folder / "curate" / "summary.json")["traffic"]["conversations"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"route": "local"}, "not answered by the teacher"),
        ({"status": 499}, "not answered by the teacher"),
        ({"egress": "redact"}, "redacted, which would teach placeholders"),
        ({"messages": []}, "without its text"),
        ({"answer": None}, "without its text"),
        ({"predictor": None}, "another prompt than the program's"),
        ({"answer": {"content": None, "tool_calls": [{}]}}, "more than text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "more than text"),
    ],
)
def test_what_teaches_nothing_is_left_out_by_name(run: Run, changes: dict[str, Any], reason: str) -> None:
    journal(run, entry("r1", **changes))
    found = harvest(run.task, run.home, run.store)
    assert (found.new, dict(found.left_out)) == (0, {reason: 1})


def test_no_sealed_example_comes_back_through_the_journal(run: Run) -> None:
    curate.run(run)
    sealed = read_jsonl(run.folder / "curate" / "test.jsonl")[0]["id"]
    other = [{"role": "system", "content": "New words."}, {"role": "user", "content": ASKED}]
    journal(
        run,
        entry("the same", f"about {sealed}"),
        entry("new prompt", messages=other),
        entry("one"),
        entry("twice", ASKED),
        entry("unread", "nothing like the others", answer={"content": "Odd, I think."}),
        entry("stutter", "something else altogether", answer={"content": "again and again and " * 9}),
    )
    harvest(run.task, run.home, run.store)
    curate.run(run)
    summary = read_json(run.folder / "curate" / "summary.json")["traffic"]
    assert summary["conversations"] == 1
    assert summary["dropped"] == {
        "duplicate or near-duplicate of an example": 2,
        "another prompt than the program's": 1,
        "answer that the program cannot read": 1,
        "more than 50% of the completion repeats itself": 1,
    }


def test_an_answer_without_the_end_that_all_captured_ones_have_was_cut_off(run: Run) -> None:
    system = read_json(run.folder / "capture" / "summary.json")["system"]
    ended = "[[ ## label ## ]]\nodd\n\n[[ ## completed ## ]]\n"
    for answer in run.store.answers(system).values():
        calls = [call | {"completion": ended} for call in answer.calls]
        run.store.add_answer(replace(answer, system="ended", calls=calls))
    short = [call | {"completion": "[[ ## label ## ]]\no", "finish_reason": "length"} for call in calls]
    run.store.add_answer(replace(answer, system="ended", example="cut off itself", calls=short))
    write_json(run.folder / "capture" / "summary.json", {"system": "ended"})
    whole = entry("whole", "a longer question than the other one", answer={"content": ended})
    journal(run, entry("cut"), whole)
    harvest(run.task, run.home, run.store)
    curate.run(run)
    traffic = read_json(run.folder / "curate" / "summary.json")["traffic"]
    assert traffic == {"conversations": 1, "dropped": {"answer without its end": 1}}


def test_close_to_an_example_is_too_close() -> None:
    call = {"predictor": "sort", "messages": [{"role": "user", "content": "about my bill of last month"}]}
    near = harvested("about my bill of last month!")
    assert [len(rows([near], [call], threshold)[0]) for threshold in (0.8, 1.0)] == [0, 1]
