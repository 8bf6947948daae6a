"""A finished run for the studies, without any model: the local ones say what a test tells them to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from tests.tasks import write_task
from trainer import pipeline, task
from trainer import program as programs
from trainer.data import Example
from trainer.lm import Endpoint, Recorder, openai_messages
from trainer.runs import Home, Run, write_json, write_jsonl
from trainer.runtimes.local import Registration
from trainer.splits import assigned
from trainer.studies.study import Study
from trainer.teacher.engine import Teacher
from trainer.teacher.prices import Ledger
from trainer.traces import Answer, Store

Messages = list[dict[str, str]]
Say = Callable[[str, Messages], tuple[str, str]]
"""(model, messages) to (completion, finish_reason)."""


@dataclass(frozen=True)
class Place:
    """Where a model is said to answer."""

    base_url: str
    model: str


@dataclass
class Local:
    """Local models that keep count of what they are asked."""

    say: Say
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(model, the whole prompt)."""
    started: list[Registration] = field(default_factory=list)

    @contextmanager
    def serving(self, registration: Registration) -> Iterator[Endpoint]:
        self.started.append(registration)
        yield Place("http://127.0.0.1:9/v1", registration.name)

    def lm(self, endpoint: Endpoint, max_tokens: int) -> dspy.LM:
        def complete(request: Request) -> Response:
            messages = openai_messages(request)
            self.asked[endpoint.model, str(messages)] += 1
            completion, finish = self.say(endpoint.model, messages)
            return _response(endpoint.model, completion, finish)

        return dspy.LM(
            f"openai/{endpoint.model}",
            engine=Recorder(complete),
            cache=False,
            num_retries=0,
            max_tokens=max_tokens,
        )


def reply(label: str) -> tuple[str, str]:
    return f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]\n", "stop"


def gold(messages: Messages) -> str:
    """The right label of what is asked last."""
    number = re.findall(r"word number (\d+)", messages[-1]["content"])[-1]
    return "odd" if int(number) % 2 else "even"


def other(messages: Messages) -> str:
    return "even" if gold(messages) == "odd" else "odd"


def shown(messages: Messages) -> int:
    """Demonstrations in a prompt."""
    return sum(message["role"] == "assistant" for message in messages)


def right(_: str, messages: Messages) -> tuple[str, str]:
    return reply(gold(messages))


def studied_run(root: Path, rows: int = 60, **settings: Any) -> Run:
    """A run of the task of `tests.tasks`, captured, curated and registered; the teacher is always right."""
    environment = {"HOMESTILL_OFFLINE": "1"}  # whatever asks the teacher anew fails
    loaded = task.load(write_task(root / "words", rows, **settings))
    home = Home(root / "home")
    home.root.mkdir(parents=True, exist_ok=True)
    store = Store.open(home.database_url)
    run = pipeline.open_run(loaded, home, store, environment)
    _finish(run)
    return run


def study_of(run: Run, name: str, local: Local, **options: Any) -> Study:
    folder = run.home.root / "studies" / run.task.name / name
    return Study(name, run, folder, serving=local, make_lm=local.lm, **options)


def registered(run: Run, key: str, name: str) -> dict[str, Any]:
    return Registration("embedded", f"{run.task.name}:{name}", key * 64, 512).to_json()


def buy(run: Run, program: programs.Program, usd: float) -> None:
    """Store the teacher's answers to all of the run's examples, at `usd` each, and what capture says of them."""
    rows, system = assigned(run.task).examples(), f"the teacher of {run.name}"
    for example in rows:
        answer = Answer(system, example.id, "teacher", run.task.name, {}, 1.0, 1.0, 10, 3, usd, None, [])
        run.store.add_answer(answer)
    about = {"system": system, "program": program.hash, "examples": len(rows), "cost_usd": usd * len(rows)}
    write_json(run.stage("capture") / "summary.json", about)


def _finish(run: Run) -> None:
    program = programs.load(run.task)
    splits = assigned(run.task).splits
    write_json(run.stage("capture") / "program.json", program.state)
    buy(run, program, 0.01)
    kept = splits["train"]
    write_jsonl(run.stage("curate") / "train.jsonl", [{"example": example.id} for example in kept])
    sealed = [{"id": example.id, "values": example.values} for example in splits["test"]]
    write_jsonl(run.stage("curate") / "test.jsonl", sealed)
    write_json(run.stage("export") / "summary.json", {"base": {"bytes": 3_000_000}})
    both = {"model": registered(run, "b", "model"), "base": registered(run, "a", "base")}
    write_json(run.stage("register") / "registration.json", both)
    for name in ("capture", "curate", "train", "export", "register"):
        write_json(run.stage(name) / "stage.json", {"inputs": "", "done": True, "seconds": 30.0})
    _capture(run, program, kept)


def _capture(run: Run, program: programs.Program, examples: list[Example]) -> None:
    """Store the teacher's calls, as capture does."""

    def client(request: Request) -> Response:
        return _response("pretend", *right("", openai_messages(request)))

    settings = run.task.settings.teacher
    assert settings.price_per_1m is not None
    ledger = Ledger(settings.price_per_1m, settings.budget_usd, lambda: 0.0)
    identity = {
        "task": run.task.name,
        "program": program.hash,
        "teacher": settings.model,
        "stand_in": settings.stand_in,
        "purpose": "capture",
    }
    engine = Teacher(lambda: client, run.store, ledger, identity)
    lm = dspy.LM(
        settings.model,
        engine=engine,
        cache=False,
        num_retries=0,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
    )
    for example in examples:
        programs.answer(program, example, lm, "teacher", "teacher")


def _response(model: str, completion: str, finish: str) -> Response:
    usage = Usage(input_tokens=10, output_tokens=3)
    return Response(None, model, Message("assistant", (TextPart(completion),)), finish, usage)
