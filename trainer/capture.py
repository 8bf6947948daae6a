"""Stage 1: the teacher answers every example; every predictor call becomes a trace in the store.

The calls are made by a process of their own. When the run that started it is killed, it finishes
and stores the calls that are on their way (they are paid for), starts no new ones, and ends; the
next run waits for that and goes on from there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import dspy

from trainer import errors, program, splits, task
from trainer.data import Example
from trainer.errors import DiskError, HomestillError, TeacherError, told
from trainer.process import module, on_parent_death
from trainer.program import Program
from trainer.progress import progress
from trainer.runs import Home, Run, read_json, sha256_json, write_json
from trainer.seam import offline
from trainer.teacher.client import open_ledger, teacher_lm
from trainer.teacher.optimize import optimize
from trainer.teacher.prices import Ledger
from trainer.teacher.quote import CHARS_PER_TOKEN, Quote, quote
from trainer.traces import Answer, Store

MAX_FAILED_AT_START = 10
STORE_BYTES = 50_000_000
"""That have to be free before a call is paid for, whatever is asked."""
TIMES_KEPT = 10
"""What is said lies in the trace, the provider's response, the answer and the database's log; and estimates err."""
FULL = errno.ENOSPC
"""Exit code of the capturing process where it has no room to leave its error."""
log = logging.getLogger("homestill.capture")

TERMS = (
    "The provider's terms may restrict training models on its outputs; check them before you use the result. "
    "Every trace keeps its teacher's name."
)


def inputs(run: Run) -> dict[str, Any]:
    teacher = run.task.settings.teacher
    return {
        "data": run.task.data_sha256,
        "code": run.task.code_sha256,
        "inputs": run.task.settings.inputs,
        "curate": run.task.settings.curate.model_dump(include={"near_duplicate", "split"}),
        "seed": run.task.settings.seed,
        "teacher": teacher.model_dump(
            include={"model", "stand_in", "optimizer", "temperature", "max_tokens"}
        ),
    }


def run(run: Run) -> None:
    """Capture in a child process and wait for it; its errors are raised here."""
    folder = run.stage("capture")
    failed = folder / "error.json"
    failed.unlink(missing_ok=True)  # of an earlier try: this one may end before it can say why
    command = module("trainer.capture", run.task.folder, run.folder, str(run.concurrency or 0))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, env=dict(run.environment), start_new_session=True, cwd=Path.cwd()
    ) as child:
        try:
            code = child.wait()
        except BaseException:
            assert child.stdin is not None
            child.stdin.close()  # tells it to finish what is on its way, and to stop
            child.wait()
            raise
    if code == FULL:
        raise DiskError(
            f"capture: the disk below {run.home.root} is full; free some space and run again, what is stored is kept"
        )
    if code != 0 and failed.is_file():
        raise _error(read_json(failed))
    if code != 0:
        raise TeacherError(
            f"the capturing process ended with code {code}; run the same command again to go on"
        )


def estimate(run: Run, stopping: threading.Event | None = None) -> Quote:
    """What is still to be bought, without buying it; the program runs on examples that have stored calls."""
    loaded = program.load(run.task, _saved_program(run))
    assignment = splits.assigned(run.task)
    done = run.store.answers(system_of(run, loaded))
    rows = assignment.examples()
    missing = [example for example in rows if example.id not in done]
    optimizes = run.task.settings.teacher.optimizer != "none" and _saved_program(run) is None
    if not optimizes:  # or else nobody knows the prompts yet
        stored = _replayed(run, loaded, missing, stopping or threading.Event())
        missing = [example for example in missing if example.id not in stored]
    return quote(loaded, missing, list(done.values()), optimizes=optimizes)


def _replayed(run: Run, loaded: Program, missing: list[Example], stopping: threading.Event) -> set[str]:
    """The examples all of whose calls are stored, as after a change that left the prompts alone: nothing is bought."""
    asked = run.store.asked(run.task.name)
    known = [each for each in missing if each.id in asked]
    if not known:
        return set()
    buying_nothing = threading.Event()
    buying_nothing.set()
    lm = teacher_lm(run, loaded.hash, "capture", open_ledger(run), stopping=buying_nothing)

    def stored(example: Example) -> bool:
        return not stopping.is_set() and program.replays(loaded, example, lm)

    workers = run.concurrency or run.task.settings.teacher.concurrency
    with progress("quote", len(known)) as advance, ThreadPoolExecutor(workers) as pool:
        found = set()
        for each, whole in zip(known, pool.map(stored, known), strict=True):
            advance()
            if whole:
                found.add(each.id)
    return found


def system_of(run: Run, loaded: Program) -> str:
    """Identity of the teacher with this program, under which its answers are stored."""
    teacher = run.task.settings.teacher
    sampling = [teacher.temperature, teacher.max_tokens]
    asked = [
        loaded.hash,
        run.task.data_sha256,
        sampling,
    ]  # a corrected label is judged anew, from stored calls
    return sha256_json(["teacher", run.task.name, teacher.model, teacher.stand_in, asked])


def work(run: Run, stopping: threading.Event) -> None:
    """Optimize the prompts if asked, answer every example, write program.json and summary.json."""
    assignment = splits.assigned(run.task)
    ledger = open_ledger(run)
    rows = assignment.examples()
    price = None if offline(run.environment) else estimate(run, stopping)
    if price and price.calls:
        log.warning("capture: %s (budget $%g)", price.sentence(), run.task.settings.teacher.budget_usd)
        log.warning("%s", TERMS)
        text = CHARS_PER_TOKEN * (price.prompt_tokens + price.completion_tokens)
        run.need_disk(STORE_BYTES + round(TIMES_KEPT * text), "capture")
    loaded = _optimized(run, assignment, ledger, stopping)
    system = system_of(run, loaded)
    done = run.store.answers(system)
    missing = [example for example in rows if example.id not in done]
    lm = teacher_lm(run, loaded.hash, "capture", ledger, stopping=stopping)
    workers = run.concurrency or run.task.settings.teacher.concurrency
    with progress("capture", len(rows), len(done)) as advance:
        for answer in _answers(
            missing, partial(_answer_one, run.store, loaded, lm, system), workers, stopping
        ):
            advance(note=f"${ledger.spent_usd:.4f} spent")
            log.debug("answered %s", answer.example)
    if stopping.is_set():
        raise TeacherError("the run was stopped; run the same command again to go on")
    _summarize(run, loaded, system, rows, price)


def _optimized(run: Run, assignment: splits.Assignment, ledger: Ledger, stopping: threading.Event) -> Program:
    saved = _saved_program(run)
    plain = program.load(run.task, saved)
    judge = teacher_lm(run, plain.hash, "judge", ledger, stopping=stopping)
    if saved is None:
        lm = teacher_lm(run, plain.hash, "optimize", ledger, stopping=stopping)
        train = assignment.splits["train"]
        state, failed = None, None
        try:
            state = optimize(program.load(run.task, judge=judge), lm, train)
        except Exception as error:  # noqa: BLE001  after so many failures an optimizer raises one of its own
            failed = error
        # optimizers swallow errors; what they made of the rest is not what was asked for
        if failed := next(iter(ledger.refused.values()), failed):
            raise program.translated(failed, TeacherError) from failed
        write_json(run.stage("capture") / "program.json", state)
    return program.load(run.task, run.stage("capture") / "program.json", judge)


def _saved_program(run: Run) -> Path | None:
    file = run.folder / "capture" / "program.json"
    return file if file.is_file() else None


def _answers(
    missing: list[Example], ask: Callable[[Example], Answer], workers: int, stopping: threading.Event
) -> Iterator[Answer]:
    """Answers as they come; no more examples are under way than there are workers.

    Raises:
        TeacherError: all of the first answers failed, so the rest would be money wasted.
    """
    waiting = deque(missing)
    under_way: set[Future[Answer]] = set()
    failed = count = 0
    with ThreadPoolExecutor(workers, "capture") as pool:
        try:
            while (waiting and not stopping.is_set()) or under_way:
                while waiting and not stopping.is_set() and len(under_way) < workers:
                    under_way.add(pool.submit(ask, waiting.popleft()))
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for answer in (future.result() for future in finished):
                    count, failed = count + 1, failed + (answer.error is not None)
                    if failed == count == MAX_FAILED_AT_START:
                        raise TeacherError(
                            f"the first {count} answers all failed, the last with {answer.error}"
                        )
                    yield answer
        except BaseException:
            stopping.set()
            raise


def _answer_one(store: Store, loaded: Program, lm: dspy.LM, system: str, example: Example) -> Answer:
    answer, opened = program.judged(loaded, example, lm, "teacher", system)
    store.score_traces(opened.traces, answer.strict_score)
    store.add_answer(answer)
    return answer


def _summarize(run: Run, loaded: Program, system: str, rows: list[Example], price: Quote | None) -> None:
    answers = run.store.answers(system)
    mine = [answers[example.id] for example in rows]
    teacher = run.task.settings.teacher
    write_json(
        run.stage("capture") / "summary.json",
        {
            "program": loaded.hash,
            "system": system,
            "teacher": teacher.model,
            "stand_in": teacher.stand_in,
            "optimizer": teacher.optimizer,
            "examples": len(mine),
            "calls": sum(len(answer.calls) for answer in mine),
            "failed": sum(answer.error is not None for answer in mine),
            "mean_score": sum(answer.score for answer in mine) / len(mine),
            "cost_usd": sum(answer.cost_usd for answer in mine),
            "spent_on_task_usd": run.store.spent(run.task.name),
            "quote": asdict(price) if price else None,
        },
    )


def _error(found: dict[str, Any]) -> HomestillError:
    """The child's error, as its own class."""
    kind = getattr(errors, found["kind"], TeacherError)
    if issubclass(kind, errors.FaultsError):
        return kind(found["message"].splitlines())
    return kind(found["message"]) if issubclass(kind, HomestillError) else TeacherError(found["message"])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until the capturing process of a killed run, of this task, has stored what was on its way."""
    with open(folder / ".capture.lock", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("capture: waiting for the calls that an interrupted run still has on their way")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> int:
    """Entry of the capturing process: task folder, run folder, concurrency (0: as the task says)."""
    task_folder, run_folder, concurrency = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    stopping = threading.Event()
    on_parent_death(stopping.set)
    failed = run_folder / "capture" / "error.json"
    with _alone(run_folder.parent):
        failed.unlink(missing_ok=True)  # of the process waited for
        try:
            loaded, home = task.load(task_folder), Home.from_environment(os.environ)
            with closing(Store.open(home.database_url)) as store:
                work(Run(loaded, home, store, run_folder, concurrency=concurrency or None), stopping)
        except (HomestillError, OSError) as error:
            return _leave(failed, error)
    return 0


def _leave(failed: Path, error: HomestillError | OSError) -> int:
    """Tell the parent why capture ended, by a file, or by the exit code where none can be written."""
    message = told(error) if isinstance(error, OSError) else str(error)
    try:
        write_json(failed, {"kind": type(error).__name__, "message": message})
    except OSError as none:
        return FULL if isinstance(error, DiskError) or none.errno in (errno.ENOSPC, errno.EDQUOT) else 1
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
