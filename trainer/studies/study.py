"""What the studies share: a finished run, the systems that are compared, and their remembered answers.

A system is a program (with its instructions and demonstrations) on a local model. Every system answers
the same examples of the sealed test split, which neither training nor optimisation has seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import dspy
import numpy as np

from trainer import evaluate, pipeline, task
from trainer import program as programs
from trainer.data import Example
from trainer.errors import EvaluateError, TaskError
from trainer.lm import Endpoint, local_lm
from trainer.program import Program
from trainer.progress import progress
from trainer.runs import Run, read_json, read_jsonl, sha256_json
from trainer.runtimes.choice import runtime
from trainer.runtimes.local import RECORD, Registration, recorded
from trainer.splits import shuffled
from trainer.statistics.scores import RESAMPLES, Floats, Interval
from trainer.studies.rows import Rows
from trainer.teacher.client import open_ledger, teacher_lm
from trainer.traces import Answer

VERSION = 1
"""Raise it when rows that were stored before no longer mean the same."""
SMALL_BYTES = 100_000_000
"""A base smaller than this is no general language model; reports say so."""
UNTIMED_MS = 1000.0
"""An answer's time in estimates, where no evaluation has measured it."""

Role = Literal["base", "student"]
ROLES: tuple[Role, ...] = ("base", "student")
MakeLM = Callable[[Endpoint, int], dspy.LM]


class Serving(Protocol):
    """The part of a runtime that a study needs."""

    def serving(self, registration: Registration) -> AbstractContextManager[Endpoint]: ...


@dataclass(frozen=True)
class System:
    """A program on a local model."""

    label: str
    role: Role
    registration: Registration
    program: Program

    def identity(self, max_tokens: int) -> str:
        """Hash of everything that decides its answers and their scores."""
        served = self.registration
        embedded = served.runtime == "embedded"
        return sha256_json(
            {
                "version": VERSION,
                "model": [served.sha256, served.name, served.context],
                "runtime": [served.runtime, version("llama-cpp-python") if embedded else served.base_url],
                "program": self.program.hash,
                "data": self.program.task.data_sha256,
                "sampling": [0.0, max_tokens],
            }
        )


@dataclass(frozen=True)
class Study:
    """A study of one finished run.

    Args:
        folder: where its rows and its report are kept.
        limit: at most so many test examples; None: all.
        context: tokens of prompt and answer that the local models shall hold; None: as registered.
        serving: starts the registered models; by default the runtime that the run is set to.
        make_lm: makes the DSPy model for an endpoint and a limit of answer tokens.
    """

    name: str
    run: Run
    folder: Path
    limit: int | None = None
    context: int | None = None
    serving: Serving | None = None
    make_lm: MakeLM = local_lm

    @property
    def rows(self) -> Rows:
        return Rows(self.folder / "rows.jsonl")

    @property
    def max_tokens(self) -> int:
        return self.run.task.settings.student.max_tokens

    @property
    def seed(self) -> int:
        return self.run.task.settings.seed

    def examples(self) -> list[Example]:
        """The test examples that are asked, by id: ids are hashes, so the first ones are a random part.

        Raises:
            EvaluateError: there is none.
        """
        rows = read_jsonl(self.run.folder / "curate" / "test.jsonl")
        if not rows:
            raise EvaluateError("the test split is empty; add examples, or enlarge curate.split.test")
        return shuffled([Example(row["id"], row["values"]) for row in rows])[: self.limit]

    def registration(self, role: Role) -> Registration:
        """The run's student or base, with the study's context.

        Raises:
            TaskError: another context was asked for of a server whose context is not ours to set.
        """
        found = recorded(self.run.folder)["model" if role == "student" else "base"]
        return with_context(found, self.context)

    def program(self, state: Path | None = None) -> Program:
        """A fresh copy of the task's program in this state; none means as its source has it."""
        source = programs.load(self.run.task, state)
        judge = teacher_lm(self.run, source.hash, "judge", open_ledger(self.run))
        return replace(source, judge=judge)

    @property
    def captured(self) -> Path:
        """State of the program whose calls the student was trained on."""
        return self.run.folder / "capture" / "program.json"

    def serve(self) -> Serving:
        return self.serving or runtime(self.run)


def finished(run: Run) -> Run:
    """The run itself, or where it is not finished the newest run of the task that is, with the settings it had.

    Raises:
        TaskError: none has a registered student, or what that run was made of is gone.
    """
    folders = [folder for folder in run.folder.parent.iterdir() if _registered(folder)]
    if _registered(run.folder):
        return run
    if not folders:
        pipeline.require(run, "evaluate")
        raise TaskError([f"no run of {run.task.name} is finished; run: homestill run {run.task.folder}"])
    newest = max(folders, key=lambda folder: (folder / RECORD).stat().st_mtime)
    own = task.recorded(run.task.folder, newest / "task.json").settings
    now = run.task.settings.teacher.model_dump(include=set(pipeline.OPERATIONAL))  # the budget among them
    settings = own.model_copy(update={"teacher": own.teacher.model_copy(update=now)})
    return replace(run, folder=newest, task=replace(run.task, settings=settings))


def _registered(folder: Path) -> bool:
    wanted = pipeline.ORDER[: pipeline.ORDER.index("register") + 1]
    return folder.is_dir() and all(pipeline.status(folder)[name] == "done" for name in wanted)


def with_context(registration: Registration, context: int | None) -> Registration:
    """The registration with another context, where it is the embedded runtime that will hold it.

    Raises:
        TaskError: a server that is already set up holds the model.
    """
    if context is None or context == registration.context:
        return registration
    if registration.runtime != "embedded":
        raise TaskError(
            [
                f"--context is {context}, but {registration.runtime} serves {registration.name} with "
                f"{registration.context} tokens; set student.context in task.yaml, or HOMESTILL_LOCAL=embedded, "
                "and run the task again"
            ]
        )
    return replace(registration, context=context)


def open_questions(study: Study, systems: Iterable[System], examples: Sequence[Example], rows: Rows) -> int:
    """How many answers are not stored yet."""
    return sum(
        example.id not in known
        for known in (rows.of(system.identity(study.max_tokens)) for system in systems)
        for example in examples
    )


def minutes(study: Study, systems: Sequence[System], examples: Sequence[Example]) -> float:
    """About how long the open questions will take, by what the run's evaluation measured for each model."""
    rows, file = study.rows, study.run.folder / "evaluate" / "summary.json"
    measured = read_json(file) if file.is_file() else {}
    time_ms = {role: float(measured[role]["latency_ms"]["mean"]) for role in measured if role in ROLES}
    return sum(
        open_questions(study, [system], examples, rows) * time_ms.get(system.role, UNTIMED_MS) / 60_000
        for system in systems
    )


def answered(study: Study, systems: Sequence[System], examples: Sequence[Example]) -> dict[str, list[Answer]]:
    """Every system's answers by its label, in the order of the examples; what is stored is not asked again.

    Raises:
        RuntimeUnavailable: a model cannot be reached; what was answered so far is kept.
        TaskError: the metric failed.
    """
    rows, source = study.rows, study.serve()
    missing = open_questions(study, systems, examples, rows)
    total = len(systems) * len(examples)
    with _truncation_untold(), progress(f"study {study.name}", total, total - missing) as advance:
        for registration in dict.fromkeys(system.registration for system in systems):
            here = [system for system in systems if system.registration == registration]
            if not open_questions(study, here, examples, rows):
                continue
            with source.serving(registration) as endpoint:
                lm = study.make_lm(endpoint, study.max_tokens)
                for system in here:
                    for _ in _ask(study, rows, system, examples, lm):
                        advance(1, system.label)
    return {system.label: _answers(rows, study, system, examples) for system in systems}


@contextmanager
def _truncation_untold() -> Iterator[None]:
    """DSPy warns of every answer that was cut off; here they are counted and reported."""
    logger = logging.getLogger("dspy.clients.lm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _ask(
    study: Study, rows: Rows, system: System, examples: Sequence[Example], lm: dspy.LM
) -> Iterator[Example]:
    """Ask for what is missing; each example is given once its answer is stored."""
    identity = system.identity(study.max_tokens)
    known = rows.of(identity)
    for example in examples:
        if example.id not in known:
            answer = programs.answer(system.program, example, lm, system.role, identity)
            rows.add(_row(_judged(answer)))
            yield example


def _judged(answer: Answer) -> Answer:
    """An answer that was cut off counts as wrong, as in evaluation."""
    cut = [call["predictor"] for call in answer.calls if call.get("finish_reason") == "length"]
    if not cut:
        return answer
    error = f"{evaluate.TRUNCATED}: {', '.join(cut)} reached the limit of answer tokens"
    return replace(answer, score=0.0, error=error)


def _row(answer: Answer) -> dict[str, Any]:
    kept = ("predictor", "completion", "finish_reason", "prompt_tokens", "completion_tokens")
    calls = [{key: call[key] for key in kept} for call in answer.calls]
    return asdict(replace(answer, calls=calls))


def _answers(rows: Rows, study: Study, system: System, examples: Sequence[Example]) -> list[Answer]:
    found = rows.of(system.identity(study.max_tokens))
    return [Answer(**found[example.id]) for example in examples]


def overflowed(answers: Sequence[Answer]) -> int:
    """How many prompts did not fit into the model's context."""
    return sum((answer.error or "").startswith("ContextWindowExceeded") for answer in answers)


def unfit(counts: Iterable[int]) -> list[str]:
    """What to note of prompts that did not fit, where there are any."""
    note = "Some prompts did not fit into the models' context and count as wrong; --context gives them more room."
    return [note] if any(counts) else []


def paired_difference(new: Floats, old: Floats, seed: int, confidence: float = 0.95) -> Interval:
    """Mean of `new` − `old`, both [n] on the same examples, with its paired bootstrap interval."""
    from scipy import stats

    difference = np.asarray(new - old, dtype=np.float64)
    mean = float(difference.mean())
    if len(difference) < 2:
        return Interval(mean, -1.0, 1.0)
    if np.ptp(difference) == 0:  # nothing to resample
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def scores(answers: Sequence[Answer]) -> Floats:
    return np.array([answer.score for answer in answers], dtype=np.float64)
