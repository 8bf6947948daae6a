"""When a watch runs a task, and what it does around a run."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve.records.journal import Entry, Journal
from tests.tasks import write_task
from tests.trainer.watch_support import entry
from trainer import pipeline, task, watching
from trainer.errors import StoreError, TaskError
from trainer.runs import Home, write_json
from trainer.settings import RetrainSettings
from trainer.watch import Watch, require_folder, retry_after, slot_between

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


@dataclass
class Work:
    """Pretends to run tasks: a run that succeeds is finished as far as the pipeline can tell."""

    home: Home
    codes: list[int] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    harvests: list[int] = field(default_factory=list)

    def harvest(self, folder: Path) -> int:
        self.done.append(f"harvest {task.load(folder).name}")
        return self.harvests.pop(0) if self.harvests else 0

    def run(self, folder: Path) -> int:
        loaded = task.load(folder)
        self.done.append(loaded.name)
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            run = self.home.runs(loaded.name) / pipeline.run_name(loaded)
            write_json(run / "release" / "stage.json", {"inputs": "x", "done": True})
        return code


@dataclass
class Box:
    """A home, a folder of tasks, a clock to set, and the watch over them."""

    root: Path
    now: datetime = NOON
    answers: int = 0
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = Home(self.root / "home")
        self.work = Work(self.home, self.codes)
        self.tasks = self.root / "tasks"
        self.stop = watching.Stopping()
        self.watch = self.started()

    def started(self) -> Watch:
        """A watch as a process that just started has it."""
        return Watch(
            self.home, self.tasks, self.work, self.stop, lambda *_: self.answers, clock=lambda: self.now
        )

    def change_data(self, name: str = "words") -> None:
        file = self.tasks / name / "data" / "rows.jsonl"
        file.write_text(file.read_text() + '{"text": "word number 98", "label": "even"}\n')


@pytest.fixture
def box(tmp_path: Path) -> Box:
    found = Box(tmp_path)
    write_task(found.tasks / "words")
    return found


def test_a_new_task_runs_once(box: Box) -> None:
    assert box.watch.look() == ["words"]
    assert box.watch.look() == []


def test_it_runs_again_when_data_program_or_settings_change(box: Box) -> None:
    box.watch.look()
    box.change_data()
    assert box.watch.look() == ["words"]
    program = box.tasks / "words" / "program.py"
    program.write_text(program.read_text() + "\n# better\n")
    assert box.watch.look() == ["words"]
    write_task(box.tasks / "words", keep_score=0.5)
    assert box.watch.look() == ["words"]
    assert box.watch.look() == []


def test_every_start_looks_every_task_over_once(box: Box) -> None:
    box.watch.look()
    again = box.started()
    assert again.look() == ["words"]
    assert again.look() == []


def test_several_tasks_one_after_the_other_and_a_broken_one_told_once(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    write_task(box.tasks / "a-first", name="a-first")
    (box.tasks / "broken").mkdir()
    (box.tasks / "broken" / "task.yaml").write_text("name: [\n")
    assert box.watch.look() == ["a-first", "words"]
    box.watch.look()
    assert caplog.text.count("broken is left out") == 1
    write_task(box.tasks / "broken", name="mended")
    assert box.watch.look() == ["mended"]


def test_a_task_folder_itself_can_be_watched(box: Box) -> None:
    box.tasks = box.tasks / "words"
    assert box.started().look() == ["words"]


def test_a_change_waits_for_the_schedule_but_the_first_run_does_not(box: Box) -> None:
    write_task(box.tasks / "words", retrain={"schedule": "daily 03:00"})
    assert box.watch.look() == ["words"]
    box.change_data()
    assert box.watch.look() == []
    box.now = NOON.replace(hour=2, minute=59) + timedelta(days=1)
    assert box.watch.look() == []
    box.now += timedelta(minutes=1)
    assert box.watch.look() == ["words"]
    box.now += timedelta(days=1)
    assert box.watch.look() == []  # nothing changed


def test_a_failed_run_rests_longer_each_time_and_a_change_ends_the_rest(box: Box) -> None:
    box.codes += [1, 1, 0, 1, 0]
    assert box.watch.look() == ["words"]
    box.now += timedelta(seconds=9)
    assert box.watch.look() == []
    box.now += timedelta(seconds=1)
    assert box.watch.look() == ["words"]
    box.now += timedelta(seconds=19)
    assert box.started().look() == []  # a restart forgets nothing
    box.now += timedelta(seconds=1)
    assert box.watch.look() == ["words"]
    box.change_data()
    assert box.watch.look() == ["words"]
    box.change_data()
    assert box.watch.look() == ["words"]


def test_a_killed_run_goes_on_at_the_next_start(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    class Killed(Exception):
        pass

    def die(folder: Path) -> int:
        raise Killed

    box.watch.work = type("Dying", (), {"run": staticmethod(die)})()
    with pytest.raises(Killed):
        box.watch.look()
    assert box.started().look() == ["words"]
    assert "goes on where it was interrupted" in caplog.text


def test_enough_new_answers_of_the_teacher_are_harvested_and_trained_on(box: Box) -> None:
    write_task(box.tasks / "words", retrain={"min_new_traces": 10})
    box.watch.look()
    box.answers = 9
    assert box.watch.look() == []
    box.answers = 10
    assert box.watch.look() == ["words"]
    assert box.work.done == ["words", "harvest words", "words"]


def test_traffic_waits_for_the_schedule_as_well(box: Box) -> None:
    write_task(box.tasks / "words", retrain={"min_new_traces": 10, "schedule": "every 6 h"})
    box.watch.look()
    box.answers = 10
    assert box.watch.look() == []
    box.now += timedelta(hours=6)
    assert box.watch.look() == ["words"]


def test_what_cannot_be_harvested_is_a_failure_like_any_other(box: Box) -> None:
    write_task(box.tasks / "words", retrain={"min_new_traces": 10})
    box.watch.look()
    box.answers, box.work.harvests = 10, [1]
    assert [box.watch.look(), box.watch.look()] == [["words"], []]  # it rests, whatever the traffic
    assert box.work.done == ["words", "harvest words"]


def test_what_was_not_harvested_is_harvested_with_the_next_try(box: Box) -> None:
    """The answers are counted from the last harvest that ended well, not from the last that began."""
    write_task(box.tasks / "words", retrain={"min_new_traces": 10})
    since: list[datetime] = []
    box.watch.new_answers = lambda _, moment: since.append(moment) or 10  # type: ignore[func-returns-value]
    box.watch.look()
    box.work.harvests = [1, -9]
    for _ in range(3):
        box.now += timedelta(hours=1)
        box.watch.look()
    assert box.work.done == ["words", *["harvest words"] * 3, "words"]
    assert since == [NOON] * 3
    box.watch.look()
    assert since[-1] == NOON + timedelta(hours=3)


def test_a_run_that_failed_after_its_harvest_rests_and_harvests_what_came_since(box: Box) -> None:
    write_task(box.tasks / "words", retrain={"min_new_traces": 10})
    box.codes += [1]
    box.watch.look()
    box.answers = 10
    assert box.watch.look() == []
    box.now += timedelta(minutes=1)
    box.watch.look()
    assert box.work.done == ["words", "harvest words", "words"]


def test_a_journal_that_cannot_be_read_is_told_once_and_stops_no_run(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(*_: object) -> int:
        raise StoreError("the journal cannot be read; start the endpoint")

    box.watch.new_answers = unreadable
    assert [box.watch.look() for _ in range(3)] == [["words"], [], []]
    assert caplog.text.count("the journal cannot be read; start the endpoint") == 1
    box.change_data()
    assert box.watch.look() == ["words"]


def test_nothing_is_started_once_it_is_told_to_stop(box: Box) -> None:
    box.stop.set()
    box.watch.forever(every_s=60)
    assert box.work.done == []


def test_what_was_stopped_is_no_failure(box: Box) -> None:
    class Stopped(Work):
        def run(self, folder: Path) -> int:
            box.stop.set()
            return 130

    box.watch.work = Stopped(box.home)
    box.watch.look()
    assert json.loads((box.home.root / "watch.json").read_text())["words"]["failures"] == 0


@pytest.mark.parametrize(
    ("schedule", "since", "now", "expected"),
    [
        ("daily 03:00", NOON, NOON + timedelta(hours=14), False),
        ("daily 03:00", NOON, NOON + timedelta(hours=15), True),
        ("daily 12:00", NOON, NOON + timedelta(hours=1), False),
        ("every 6 h", NOON, NOON + timedelta(hours=5, minutes=59), False),
        ("every 6 h", NOON, NOON + timedelta(hours=6), True),
    ],
)
def test_slots(schedule: str, since: datetime, now: datetime, expected: bool) -> None:
    assert slot_between(schedule, since, now) is expected


@pytest.mark.parametrize("schedule", ["hourly", "daily 25:00", "daily 3:00", "every 0 h", "every 6 hours"])
def test_a_schedule_of_another_form_is_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        RetrainSettings(schedule=schedule)


def test_the_rest_grows_to_an_hour() -> None:
    assert [retry_after(n).seconds for n in (1, 2, 3, 9, 10, 1000)] == [10, 20, 40, 2560, 3600, 3600]


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is no folder"):
        require_folder(tmp_path / "nowhere")


class TestChild:
    def child(
        self, code: str, stopping: watching.Stopping, pulses: list[int] | None = None
    ) -> watching.Child:
        beats = [] if pulses is None else pulses
        return watching.Child(
            os.environ, stopping, lambda: beats.append(1), lambda *_: [sys.executable, "-c", code]
        )

    @pytest.mark.parametrize("code", [0, 3])
    def test_the_exit_code_is_the_runs(self, tmp_path: Path, code: int) -> None:
        pulses: list[int] = []
        assert self.child(f"raise SystemExit({code})", watching.Stopping(), pulses).run(tmp_path) == code
        assert pulses == [1]

    def test_sigterm_interrupts_the_child_and_lets_it_end_in_order(self, tmp_path: Path) -> None:
        stopping = watching.Stopping()
        code = (
            "import os, signal, sys, time\n"
            f"def told(*_): print('in order', file=open('{tmp_path / 'ended'}', 'w')); sys.exit(130)\n"
            "signal.signal(signal.SIGINT, told)\n"
            "os.kill(os.getppid(), signal.SIGTERM)\n"
            "signal.pause()\n"
        )
        child = self.child(code, stopping)
        with watching.stopped_by_signals(stopping, child.interrupt):
            assert child.run(tmp_path) == 130
        assert (tmp_path / "ended").read_text() == "in order\n"
        assert stopping.is_set()

    def test_the_signal_ends_the_wait_at_once(self) -> None:
        stopping = watching.Stopping()
        with watching.stopped_by_signals(stopping, lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping.wait(60)


def test_new_answers_are_those_of_the_teacher_since_then(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert watching.new_answers(home, "words", NOON) == 0
    journal = Journal(f"sqlite:///{tmp_path / 'journal.db'}")
    later = NOON + timedelta(hours=1)
    entries: list[Entry] = [
        entry("a", "words", later),
        entry("b", "words", later, route="local"),
        entry("c", "words", NOON - timedelta(hours=1)),
        entry("d", "other", later),
        entry("e", "words", later, status=500, answer=None),
        entry("f", "words", later, egress="redact"),
        entry("g", "words", later, predictor=None),
    ]
    for each in entries:
        journal.record(each)
    journal.close()
    assert watching.new_answers(home, "words", NOON) == 1
