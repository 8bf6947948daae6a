"""The teacher as a DSPy model: its key, its client, its price, and what it may still spend."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import dspy
from dspy.utils.exceptions import LMConfigurationError

from trainer.errors import TeacherError
from trainer.runs import Run
from trainer.seam import offline
from trainer.settings import Price, TeacherSettings
from trainer.teacher.engine import Teacher
from trainer.teacher.prices import Ledger, price_of

NO_KEY = "not-needed"  # a gateway or stand-in without authentication; the client insists on a key


def make_client(settings: TeacherSettings, environment: Mapping[str, str]) -> dspy.LM:
    """The provider's client. It asks once; `teacher_lm` asks again, so that every attempt is reckoned with.

    The key comes from the provider's usual variable, or from the file that `<VARIABLE>_FILE` names.

    Raises:
        TeacherError: offline, or settings that the model does not take.
    """
    if offline(environment):
        raise TeacherError(
            f"HOMESTILL_OFFLINE is set and a call to {settings.model} is needed; "
            "unset it, or carry in the traces of this data"
        )
    address = environment.get("HOMESTILL_TEACHER_API_BASE") or settings.api_base
    options = {"api_base": address} if address else {}
    if key := _key(settings, environment) or (NO_KEY if address else None):
        options["api_key"] = key
    try:
        return dspy.LM(settings.model, cache=False, num_retries=0, timeout=settings.timeout_s, **options)
    except (LMConfigurationError, ValueError) as error:
        raise TeacherError(f"teacher.model is {settings.model!r}: {error}") from error


def _key(settings: TeacherSettings, environment: Mapping[str, str]) -> str | None:
    provider = settings.model.partition("/")[0] if "/" in settings.model else "openai"
    variable = f"{provider.upper().replace('-', '_')}_API_KEY"
    file = environment.get(f"{variable}_FILE")
    if file:
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise TeacherError(
                f"{variable}_FILE is {file}: {error.strerror}; name a readable file"
            ) from error
    return environment.get(variable)


def open_ledger(run: Run) -> Ledger:
    """The task's budget, against what its traces have cost whoever bought them; one for all that is asked at once.

    Raises:
        TeacherError: the price is not known.
    """
    settings = run.task.settings.teacher
    price = Price(input=0, output=0) if offline(run.environment) else price_of(settings)
    return Ledger(price, settings.budget_usd, lambda: run.store.spent(run.task.name))


def teacher_lm(
    run: Run, program_hash: str, purpose: str, ledger: Ledger, *, stopping: threading.Event | None = None
) -> dspy.LM:
    """The task's teacher as a DSPy model that records, replays and keeps to the budget.

    It asks again with backoff on 429, 5xx and timeouts, and honours Retry-After.

    Args:
        purpose: capture, optimize or judge.
        stopping: once set, no further call is bought.
    """
    settings = run.task.settings.teacher
    identity = {
        "task": run.task.name,
        "program": program_hash,
        "teacher": settings.model,
        "stand_in": settings.stand_in,
        "purpose": purpose,
    }
    engine = Teacher(
        lambda: make_client(settings, run.environment),
        run.store,
        ledger,
        identity,
        stopping=stopping,
    )
    try:
        return dspy.LM(
            settings.model,
            engine=engine,
            cache=False,
            num_retries=settings.retries,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
        )
    except (LMConfigurationError, ValueError) as error:
        raise TeacherError(
            f"{error}; set teacher.temperature and teacher.max_tokens to what {settings.model} takes"
        ) from error
