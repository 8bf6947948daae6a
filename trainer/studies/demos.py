"""How many demonstrations does a prompt need before and after fine-tuning?

The same demonstrations are put into the prompts of base and student: what the teacher answered to the
first k examples of one random order of the curated training examples, so that k + 1 contains k.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dspy

from trainer import program as programs
from trainer.data import Example
from trainer.errors import EvaluateError
from trainer.program import Program
from trainer.runs import read_json, read_jsonl
from trainer.splits import assigned, shuffled
from trainer.statistics.scores import Interval, mean_interval
from trainer.studies import pictures
from trainer.studies.report import Outcome, Picture, Table, percent
from trainer.studies.study import ROLES, Role, Study, System, answered, overflowed, scores, unfit
from trainer.teacher.client import open_ledger, teacher_lm
from trainer.traces import Answer

MOST = 8
Demonstrations = list[dict[str, dspy.Example]]
"""For each example the demonstration of every predictor, by its name."""


@dataclass(frozen=True)
class Efficiency:
    """Demonstrations that base and student need for the same score: the base's best."""

    score: float
    base: int
    """The fewest with which the base reaches its best score."""
    student: int | None
    """The fewest with which the student reaches that; None where it never does."""

    best: int
    """The fewest with which the student reaches its own best score."""

    @property
    def ratio(self) -> float | None:
        """How many of the base's demonstrations one of the student's replaces; None where one of them needs none."""
        return self.base / self.student if self.student and self.base else None

    def sentence(self) -> str:
        best = f"the base's best score, {100 * self.score:.1f} with k = {self.base}"
        if self.score <= 0:
            return f"The base scores 0 with every number of demonstrations, so there is no ratio; the student is best with k = {self.best}."
        if self.student is None:
            return f"The student does not reach {best}."
        if self.ratio is None:
            need = "without a demonstration" if not self.student else f"with k = {self.student}"
            return f"The student reaches {best}, {need}."
        return f"The student reaches {best}, with k = {self.student}: a ratio of {self.ratio:.1f}."


def systems(study: Study, most: int = MOST) -> list[System]:
    """Base and student with 0 to `most` demonstrations."""
    demonstrations = chosen(study, most)
    return [
        System(f"{role}, k = {k}", role, study.registration(role), _with(study, demonstrations[:k]))
        for role in ROLES
        for k in range(most + 1)
    ]


def run(study: Study, most: int = MOST) -> Outcome:
    """Ask base and student with every number of demonstrations.

    Raises:
        EvaluateError: there are fewer usable demonstrations than `most`.
        RuntimeUnavailable: a model cannot be reached; what was answered so far is kept.
    """
    examples = study.examples()
    found = answered(study, systems(study, most), examples)
    means = {label: mean_interval(scores(rows), seed=study.seed) for label, rows in found.items()}
    by_role = {role: [means[f"{role}, k = {k}"] for k in range(most + 1)] for role in ROLES}
    reached = efficiency(by_role["base"], by_role["student"])
    return _outcome(study, found, by_role, reached)


def chosen(study: Study, most: int) -> Demonstrations:
    """The demonstrations: the teacher's stored calls for curated training examples, replayed unpaid.

    Raises:
        EvaluateError: there are fewer than `most`.
    """
    kept = {row["example"] for row in read_jsonl(study.run.folder / "curate" / "train.jsonl")}
    examples = [example for example in assigned(study.run.task).splits["train"] if example.id in kept]
    if len(examples) < most:
        raise EvaluateError(
            f"{most} demonstrations are asked for, {len(examples)} curated training examples are left of the data; "
            "lower --most, or restore the data that the run was made of"
        )
    picked = random.Random(study.seed).sample(shuffled(examples), most)
    return [demonstration(study, example) for example in picked]


def demonstration(study: Study, example: Example) -> dict[str, dspy.Example]:
    """What each predictor was given and what the teacher answered, for one example.

    Raises:
        EvaluateError: the teacher's answer cannot be read.
    """
    program = study.program(study.captured)
    captured = read_json(study.run.folder / "capture" / "summary.json")
    teacher = teacher_lm(study.run, program.hash, "capture", open_ledger(study.run))
    with dspy.context(trace=[]):
        answer, _ = programs.judged(program, example, teacher, "teacher", captured["system"])
        trace = list(dspy.settings.trace)
    if answer.error or not trace:
        raise EvaluateError(
            f"the teacher's answer to example {example.id} cannot be read again ({answer.error}); "
            "run capture and curate again"
        )
    return {
        program.names[id(predictor)]: dspy.Example(**given, **said)
        for predictor, given, said in reversed(trace)  # the first call of a predictor counts
        if id(predictor) in program.names
    }


def efficiency(base: Sequence[Interval], student: Sequence[Interval]) -> Efficiency:
    """From each one's scores with 0, 1, 2 ... demonstrations."""
    best = max(interval.mean for interval in base)
    first = [interval.mean for interval in base].index(best)
    reached = [k for k, interval in enumerate(student) if interval.mean >= best]
    own = [interval.mean for interval in student]
    return Efficiency(best, first, reached[0] if reached else None, own.index(max(own)))


def _with(study: Study, demonstrations: Demonstrations) -> Program:
    program = study.program(study.captured)
    for name, predictor in program.module.named_predictors():
        predictor.demos = [each[name] for each in demonstrations if name in each]
    return program


def _outcome(
    study: Study,
    found: Mapping[str, Sequence[Answer]],
    by_role: Mapping[Role, Sequence[Interval]],
    reached: Efficiency,
) -> Outcome:
    count = range(len(by_role["base"]))
    too_long = [sum(overflowed(found[f"{role}, k = {k}"]) for role in ROLES) for k in count]
    rows = [
        [
            str(k),
            *percent(by_role["base"][k]),
            *percent(by_role["student"][k]),
            str(too_long[k]),
        ]
        for k in count
    ]
    picture = pictures.curves(
        "Score by number of demonstrations",
        list(count),
        [pictures.Series(role, by_role[role]) for role in ROLES],
        "demonstrations in the prompt",
    )
    return Outcome(
        title="Score by number of demonstrations",
        finding=reached.sentence(),
        table=Table(
            ("k", "Base", "95 % interval", "Student", "95 % interval", "Did not fit"),
            rows,
            marked=str(reached.student if reached.ratio else reached.best),
        ),
        meaning=_meaning(),
        pictures=[
            Picture(
                picture,
                "Mean score with its 95 % interval. The same score with fewer demonstrations is better.",
            )
        ],
        notes=unfit(too_long),
        figures=_figures(by_role, reached),
    )


def _figures(by_role: Mapping[Role, Sequence[Interval]], reached: Efficiency) -> dict[str, Any]:
    return {
        **{role: [asdict(interval) for interval in by_role[role]] for role in ROLES},
        "efficiency": asdict(reached) | {"ratio": reached.ratio},
    }


def _meaning() -> dict[str, str]:
    return {
        "k": "Demonstrations in every predictor's prompt: the teacher's answers to k curated training examples, "
        "the same for base and student. They replace those that the captured program has of its own.",
        "Base, student": "Mean score of the task's metric on the test examples with the greedy answer of the "
        "quantised model. An answer that cannot be read, is cut off or does not fit counts as 0.",
        "Ratio": "The fewest demonstrations with which the base reaches its best mean, divided by the fewest with "
        "which the student reaches that mean. The means decide, not the intervals: where those overlap widely, "
        "the ratio may be chance.",
        "Student": "Fine-tuned on prompts with the demonstrations of the captured program. Another number of them "
        "is a prompt that it was not trained on.",
        "Test examples": "The sealed test split. Whoever chooses k by this table should confirm the choice on new data.",
    }
