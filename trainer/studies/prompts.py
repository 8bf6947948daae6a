"""Prompts for a local model, by DSPy's own optimizers; a killed search asks nothing twice."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.lm15 import Request, Response
from dspy.utils.exceptions import ContextWindowExceededError, LMError

from trainer.errors import HomestillError, RuntimeUnavailable
from trainer.lm import Endpoint
from trainer.program import Program
from trainer.progress import Advance, progress
from trainer.runtimes.local import Registration
from trainer.settings import Price
from trainer.splits import assigned, shuffled
from trainer.studies.study import Study
from trainer.task import Task
from trainer.teacher.engine import Teacher
from trainer.teacher.optimize import RANDOM_SEARCH_CANDIDATES, VALIDATION_SHARE, optimize
from trainer.teacher.prices import Ledger
from trainer.traces import Store

Optimizer = Literal["bootstrap", "random_search", "mipro", "gepa"]
EXAMPLES = 100
"""Training examples that an optimizer is given."""
MANY = 10**9
"""Errors that an optimizer may see: an answer that cannot be read is a bad candidate, not a reason to stop."""


@dataclass(frozen=True)
class Settings:
    """How prompts are optimised."""

    optimizer: Optimizer = "random_search"
    examples: int = EXAMPLES


def optimized(
    study: Study, program: Program, settings: Settings, registration: Registration, folder: Path
) -> tuple[dict[str, Any], float]:
    """Optimise the program's prompts for a local model.

    Args:
        folder: where the optimizer's own words are kept.

    Returns:
        The new state, and what judging by a paid model has cost, in US dollars.

    Raises:
        HomestillError: the model or the judge failed; what was answered so far is kept.
    """
    judging = _Judging(program)
    train = shuffled(assigned(study.run.task).splits["train"])[: settings.examples]
    stored = Store.open(f"sqlite:///{_made(study.folder) / 'calls.db'}")
    ledger = Ledger(Price(input=0, output=0), 0.0, lambda: 0.0)  # a local model's calls cost nothing
    paid = study.run.store.spent(study.run.task.name)
    name = f"study {study.name}: prompts for {registration.name}"
    with (
        contextlib.closing(stored),
        study.serve().serving(registration) as endpoint,
        progress(name, calls(len(train))) as advance,
        open(_made(folder) / "optimizer.log", "w", encoding="utf-8") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),  # the progress above keeps the stream that it was opened with
        dspy.context(max_errors=MANY),
    ):
        identity = {
            "task": study.run.task.name,
            "program": "",
            "teacher": f"{registration.name} {registration.sha256} {registration.context}",
            "stand_in": False,
            "purpose": "study",
        }
        engine = Teacher(lambda: study.make_lm(endpoint, study.max_tokens), stored, ledger, identity)
        counted = _Counted(engine, advance)
        lm = _remembered(endpoint, counted, study.max_tokens)
        state = optimize(judging.optimised_by(settings), lm, train)
    failed = judging.failed or counted.failed
    if failed:  # optimizers swallow errors; what they made of the rest is not what was asked for
        raise _ours(failed) from failed
    return state, study.run.store.spent(study.run.task.name) - paid


def calls(train: int) -> int:
    """About how many answers a random search asks for; the other optimizers' numbers are of its size."""
    return round(train * VALIDATION_SHARE) * (RANDOM_SEARCH_CANDIDATES + 3) + train


class _Counted:
    """An engine that tells the progress of each call, and keeps the failure that an optimizer would swallow."""

    def __init__(self, inner: Teacher, advance: Advance) -> None:
        self._inner = inner
        self._advance = advance
        self.failed: Exception | None = None

    def complete(self, request: Request) -> Response:
        try:
            response = self._inner.complete(request)
        except ContextWindowExceededError:
            raise  # the candidate is at fault, not the model
        except Exception as error:
            self.failed = error
            raise
        self._advance(1)
        return response


def _remembered(endpoint: Endpoint, engine: _Counted, max_tokens: int) -> dspy.LM:
    """The local model, whose every call is stored and replayed: a killed optimisation asks nothing twice."""
    return dspy.LM(
        f"openai/{endpoint.model}",
        engine=engine,
        cache=False,
        num_retries=0,
        temperature=0.0,
        max_tokens=max_tokens,
    )


class _Judging:
    """A program whose metric asks its own judge, not the model that is optimised, and keeps the judge's refusal."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.failed: Exception | None = None

    def metric(self, gold: Any, prediction: Any, trace: Any = None) -> Any:
        with dspy.context(lm=self._program.judge):
            try:
                return self._program.metric(gold, prediction, trace)
            except (HomestillError, LMError) as error:
                self.failed = error
                raise

    def optimised_by(self, settings: Settings) -> Program:
        """The program as `optimize` takes it: the optimizer's name stands in its task."""
        source = self._program.task.settings
        teacher = source.teacher.model_copy(update={"optimizer": settings.optimizer, "concurrency": 1})
        changed = source.model_copy(update={"teacher": teacher})
        return replace(self._program, metric=self.metric, task=Task(self._program.task.folder, changed))


def _ours(error: Exception) -> HomestillError:
    """Our own error where one lies behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HomestillError):
            return cause
        cause = cause.__cause__
    return RuntimeUnavailable(f"{type(error).__name__}: {error}; run again, what was answered so far is kept")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
