"""The pipeline: stages are skipped, resumed or done afresh by the hash of their inputs."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import write_task
from trainer import pipeline, task
from trainer.errors import BusyError, DiskError, TaskError
from trainer.pipeline import Stage
from trainer.runs import Home, Run, holder, locked, write_json
from trainer.traces import Store


class Pretend:
    """A stage that writes a file, and can be told to fail or to depend on something else."""

    def __init__(self, name: str = "curate") -> None:
        self.depends: Any = 1
        self.fail: Exception | None = None
        self.runs = 0
        self.found: list[str] = []
        self.stage = Stage(name, lambda run: {"on": self.depends}, self._run)

    def _run(self, run: Run) -> None:
        self.runs += 1
        self.found = sorted(file.name for file in run.stage(self.stage.name).glob("*.txt"))
        (run.stage(self.stage.name) / f"{self.runs}.txt").write_text("done", encoding="utf-8")
        if self.fail:
            raise self.fail


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    store = Store.open(home.database_url)
    yield pipeline.open_run(task.load(write_task(tmp_path / "words")), home, store, os.environ)
    store.close()


def test_a_finished_stage_is_not_done_again(run: Run) -> None:
    pretend = Pretend()
    assert pipeline.execute(run, [pretend.stage]) == ["curate"]
    assert pipeline.execute(run, [pretend.stage]) == []
    assert pretend.runs == 1


def test_an_interrupted_stage_finds_its_partial_work(run: Run) -> None:
    pretend = Pretend()
    pretend.fail = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        pipeline.execute(run, [pretend.stage])
    assert pipeline.status(run.folder)["curate"] == "interrupted"
    pretend.fail = None
    pipeline.execute(run, [pretend.stage])
    assert pretend.found == ["1.txt"]
    assert pipeline.status(run.folder)["curate"] == "done"


def test_other_inputs_start_from_an_empty_folder(run: Run) -> None:
    pretend = Pretend()
    pipeline.execute(run, [pretend.stage])
    pretend.depends = 2
    pipeline.execute(run, [pretend.stage])
    assert (pretend.runs, pretend.found) == (2, [])


def test_another_run_of_the_task_lends_a_stage_with_the_same_inputs(run: Run) -> None:
    pretend = Pretend()
    pipeline.execute(run, [pretend.stage])
    other_task = task.load(write_task(run.task.folder, quality={"keep": 0.5}))
    other = pipeline.open_run(other_task, run.home, run.store, os.environ)
    assert other.folder != run.folder
    assert pipeline.execute(other, [pretend.stage]) == []
    assert (other.folder / "curate" / "1.txt").read_text(encoding="utf-8") == "done"
    assert pretend.runs == 1


def test_how_the_teacher_is_reached_does_not_make_another_run(run: Run) -> None:
    name = pipeline.run_name(run.task)
    teacher = {"model": "openai/pretend", "stand_in": True, "price_per_1m": {"input": 1, "output": 2}}
    moved = {**teacher, "api_base": "http://127.0.0.1:1/v1", "concurrency": 9, "budget_usd": 1}
    assert pipeline.run_name(task.load(write_task(run.task.folder, teacher=moved))) == name
    assert (
        pipeline.run_name(task.load(write_task(run.task.folder, teacher={**teacher, "max_tokens": 9})))
        != name
    )


def test_two_runs_at_once_is_one_clear_error(run: Run) -> None:
    with locked(run.home.runs("words"), "words"), pytest.raises(BusyError) as caught:
        pipeline.execute(run, [Pretend().stage])
    assert (
        str(caught.value)
        == f"task words is being run by process {os.getpid()}; wait for it to end or stop it"
    )


def test_who_looks_at_a_lock_keeps_nobody_out(run: Run) -> None:
    folder = run.home.runs("words")
    with locked(folder, "words", "r"):
        assert holder(folder) == (str(os.getpid()), "r")
    with open(folder / ".lock") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.02, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN)).start()
        with locked(folder, "words"):
            pass


def test_several_may_write_one_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            write_json(tmp_path / "file.json", {"from": number})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_full_disk_is_one_clear_error(run: Run) -> None:
    pretend = Pretend()
    pretend.fail = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskError, match="free some space and run again"):
        pipeline.execute(run, [pretend.stage])


def test_a_stage_asks_for_the_ones_before_it(run: Run) -> None:
    with pytest.raises(
        TaskError, match=r"train needs capture, which is not finished; run: homestill capture"
    ):
        pipeline.require(run, "train")


def test_a_link_that_was_cut_short_does_not_count_as_done(run: Run) -> None:
    pretend = Pretend()
    pipeline.execute(run, [pretend.stage])
    other_task = task.load(write_task(run.task.folder, quality={"keep": 0.5}))
    other = pipeline.open_run(other_task, run.home, run.store, os.environ)
    (other.folder / "curate").mkdir()
    (other.folder / "curate" / "half.txt").write_text("", encoding="utf-8")  # no stage.json yet
    assert pipeline.execute(other, [pretend.stage]) == []
    assert not (other.folder / "curate" / "half.txt").exists()
    assert (other.folder / "curate" / "1.txt").exists()
