"""Capture: durable, resumable, priced, and never paid twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.servers import PretendTeacher, serving
from tests.tasks import write_task
from trainer import capture, pipeline, task
from trainer.errors import BudgetError, DiskError, TeacherError
from trainer.process import module
from trainer.runs import Home, Run, read_json, write_json
from trainer.traces import Store


@dataclass
class Desk:
    """A pretend teacher, a task that asks it, and what a run needs."""

    teacher: PretendTeacher
    folder: Path
    environment: dict[str, str]

    @contextmanager
    def run(self) -> Iterator[Run]:
        home = Home.from_environment(self.environment)
        home.root.mkdir(parents=True, exist_ok=True)
        store = Store.open(home.database_url)
        try:
            yield pipeline.open_run(task.load(self.folder), home, store, self.environment)
        finally:
            store.close()

    def work(self) -> dict[str, Any]:
        """Capture in this process; gives the summary."""
        with self.run() as run:
            capture.work(run, threading.Event())
            found: dict[str, Any] = read_json(run.folder / "capture" / "summary.json")
            return found

    def command(self) -> subprocess.Popen[str]:
        """`homestill capture` as people start it."""
        words = module("trainer", "capture", self.folder)
        return subprocess.Popen(words, env=self.environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    teacher = PretendTeacher()
    with serving(teacher.app) as address:
        environment = {**os.environ, "HOMESTILL_TEACHER_API_BASE": f"{address}/v1"}
        yield Desk(teacher, write_task(tmp_path / "words", rows=12), environment)


def change(folder: Path, **teacher: Any) -> None:
    write_task(folder, rows=12, teacher={**SETTINGS_TEACHER, **teacher})


SETTINGS_TEACHER: dict[str, Any] = {
    "model": "openai/pretend",
    "stand_in": True,
    "price_per_1m": {"input": 1000, "output": 2000},
    "concurrency": 2,
    "retries": 0,
}


def test_every_call_becomes_a_trace_and_a_rerun_asks_nothing(desk: Desk) -> None:
    summary = desk.work()
    assert (summary["examples"], summary["calls"], summary["failed"], summary["mean_score"]) == (
        12,
        12,
        0,
        1.0,
    )
    assert summary["cost_usd"] == pytest.approx(12 * (100 * 1 + 10 * 2) / 1e6)
    assert summary["stand_in"] is True
    assert len(desk.teacher.asked) == 12
    assert desk.work()["calls"] == 12
    assert len(desk.teacher.asked) == 12
    with desk.run() as run:
        (answer, *_) = run.store.answers(summary["system"]).values()
        assert [message["role"] for message in answer.calls[0]["messages"]] == ["system", "user"]
        assert answer.calls[0]["predictor"] == "sort"


def test_transient_failures_are_retried_with_the_same_question(desk: Desk) -> None:
    change(desk.folder, retries=3, concurrency=1)
    desk.teacher.failures = [429, 503]
    assert desk.work()["failed"] == 0
    counts = Counter(desk.teacher.asked)
    assert sorted(counts.values()) == [1] * 11 + [3]


def test_a_refused_key_stops_at_once_and_keeps_what_was_answered(desk: Desk) -> None:
    desk.work()
    with (desk.folder / "data" / "rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": "word number 99", "label": "odd"}) + "\n")
    desk.teacher.failures = [401]
    with pytest.raises(TeacherError, match="check the key"):
        desk.work()
    assert desk.work()["examples"] == 13
    assert len(desk.teacher.asked) == 14


def test_budget_is_hard_and_raising_it_pays_nothing_twice(desk: Desk) -> None:
    change(desk.folder, budget_usd=3.5, max_tokens=1000, concurrency=1)  # a call may cost $3, and costs $0.12
    with pytest.raises(BudgetError, match=r"teacher.budget_usd is 3.5"):
        desk.work()
    asked = len(desk.teacher.asked)
    assert 0 < asked < 12
    change(desk.folder, budget_usd=500, max_tokens=1000, concurrency=1)
    desk.work()
    assert Counter(desk.teacher.asked).most_common(1)[0][1] == 1


def test_a_process_that_cannot_begin_does_not_tell_an_earlier_error(desk: Desk) -> None:
    with desk.run() as run:
        write_json(run.stage("capture") / "error.json", {"kind": "BudgetError", "message": "of last week"})
        broken = replace(run, environment={"PYTHONHOME": str(desk.folder)})  # no Python starts there
        with pytest.raises(TeacherError, match="the capturing process ended with code 1"):
            capture.run(broken)


def test_unknown_price_is_an_error_not_zero(desk: Desk) -> None:
    write_task(desk.folder, teacher={"model": "openai/pretend", "api_base": "http://127.0.0.1:9/v1"})
    with pytest.raises(TeacherError, match="price_per_1m"):
        desk.work()
    assert desk.teacher.asked == []


def test_unparsable_answers_count_as_failures_and_are_asked_once(desk: Desk) -> None:
    desk.teacher.answer = "I would rather not say."
    with pytest.raises(TeacherError, match="the first 10 answers all failed"):
        desk.work()
    assert Counter(desk.teacher.asked).most_common(1)[0][1] == 1


def test_offline_makes_no_client(desk: Desk) -> None:
    desk.environment["HOMESTILL_OFFLINE"] = "1"
    with pytest.raises(TeacherError, match="HOMESTILL_OFFLINE"):
        desk.work()
    assert desk.teacher.asked == []


def test_offline_goes_on_from_carried_traces(desk: Desk) -> None:
    desk.work()
    desk.environment["HOMESTILL_OFFLINE"] = "1"
    with desk.run() as run:
        (run.folder / "capture" / "summary.json").unlink()
    assert desk.work()["examples"] == 12


def test_missing_key_is_one_clear_line(desk: Desk) -> None:
    write_task(desk.folder, teacher={"model": "openai/gpt-4o"})
    del desk.environment["HOMESTILL_TEACHER_API_BASE"]
    with pytest.raises(TeacherError) as caught:
        desk.work()
    assert str(caught.value) == (
        "no key for openai/gpt-4o: OPENAI_API_KEY is not set; export it, or name a file in OPENAI_API_KEY_FILE"
    )


def test_unreachable_teacher_is_one_clear_line(desk: Desk) -> None:
    desk.environment["HOMESTILL_TEACHER_API_BASE"] = "http://127.0.0.1:9/v1"
    with pytest.raises(TeacherError, match="check the address") as caught:
        desk.work()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rounds", [2])
def test_kill_9_between_question_and_answer_asks_nothing_twice(desk: Desk, rounds: int) -> None:
    for _ in range(rounds):
        desk.teacher.hold = threading.Event()
        child = desk.command()
        assert desk.teacher.arrived.acquire(timeout=60)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stderr is not None
        child.stderr.close()
        desk.teacher.hold.set()
    desk.teacher.hold = None
    last = desk.command()
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert Counter(desk.teacher.asked).most_common(1)[0][1] == 1
    assert len(desk.teacher.asked) == 12


def test_a_corrected_label_is_judged_anew_and_nothing_is_bought(desk: Desk) -> None:
    assert desk.work()["mean_score"] == 1.0
    rows = desk.folder / "data" / "rows.jsonl"
    rows.write_text(rows.read_text("utf-8").replace('"even"', '"odd"', 1), encoding="utf-8")
    assert desk.work()["mean_score"] == pytest.approx(11 / 12)
    assert len(desk.teacher.asked) == 12


def test_another_metric_of_the_same_file_judges_anew_and_nothing_is_bought(desk: Desk) -> None:
    with desk.run() as run:
        before = capture.inputs(run)
    assert desk.work()["mean_score"] == 1.0
    write_task(desk.folder, rows=12, metric="program.py:graded", teacher=SETTINGS_TEACHER)
    with desk.run() as run:
        assert capture.inputs(run) != before
    assert desk.work()["mean_score"] == 0.75
    assert len(desk.teacher.asked) == 12


def test_a_refusal_that_the_program_swallows_is_no_answer(desk: Desk) -> None:
    program = desk.folder / "program.py"
    swallowing = "try:\n            return self.sort(text=text)\n        except Exception:\n            return dspy.Prediction(label='odd')"
    program.write_text(
        program.read_text("utf-8").replace("return self.sort(text=text)", swallowing), encoding="utf-8"
    )
    desk.teacher.failures = [401]
    with pytest.raises(TeacherError, match="check the key"):
        desk.work()
    assert desk.work()["mean_score"] == 1.0


@pytest.mark.filterwarnings("ignore")  # of the optimizer's libraries
def test_a_refusal_inside_an_optimizer_is_said_as_anywhere(desk: Desk) -> None:
    write_task(desk.folder, rows=80, teacher={**SETTINGS_TEACHER, "optimizer": "bootstrap"})
    desk.teacher.failures = [401] * 200
    with pytest.raises(TeacherError, match="check the key"):
        desk.work()


def test_a_disk_without_room_for_the_answers_is_found_before_they_are_paid_for(desk: Desk) -> None:
    with desk.run() as run, pytest.raises(DiskError, match=r"capture needs 0\.05 GB below"):
        capture.work(replace(run, disk_free=lambda _: 1_000_000), threading.Event())
    assert desk.teacher.asked == []


def test_what_can_be_left_for_the_parent_on_a_full_disk_is_the_exit_code(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert capture._leave(tmp_path / "file" / "error.json", DiskError("full")) == capture.FULL
    assert capture._leave(tmp_path / "error.json", OSError(errno.ENOSPC, "No space left", "a")) == 1
    assert read_json(tmp_path / "error.json") == {"kind": "OSError", "message": "a: No space left"}
    assert capture._leave(tmp_path / "file" / "error.json", TeacherError("other")) == 1
    (tmp_path / "sitecustomize.py").write_text(f"import os; os._exit({capture.FULL})", encoding="utf-8")
    with desk.run() as run, pytest.raises(DiskError, match=r"the disk below .* is full"):
        capture.run(replace(run, environment={"PYTHONPATH": str(tmp_path)}))


def test_what_is_quoted_is_what_will_be_bought(desk: Desk) -> None:
    desk.work()
    program = desk.folder / "program.py"
    program.write_text(f"# a comment\n{program.read_text('utf-8')}", encoding="utf-8")
    with (desk.folder / "data" / "rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": "word number 99", "label": "odd"}) + "\n")
    with desk.run() as run:
        found = capture.estimate(run)
    assert (found.examples, found.calls) == (1, 1)
    stopped = threading.Event()
    stopped.set()
    with desk.run() as run:  # the program runs no more once the run is being stopped
        assert capture.estimate(run, stopped).calls == 13
    assert len(desk.teacher.asked) == 12
    change(desk.folder, max_tokens=50)  # another question
    with desk.run() as run:
        assert capture.estimate(run).calls == 12
    assert len(desk.teacher.asked) == 12
