"""How much instruction do base and student need: from a bare line to a multi-step procedure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dspy
import yaml

from trainer.errors import TaskError
from trainer.program import Program
from trainer.statistics.scores import Interval, mean_interval
from trainer.studies import pictures
from trainer.studies.report import Outcome, Picture, Table, percent
from trainer.studies.study import ROLES, Role, Study, System, answered, overflowed, scores, unfit

FILE = "instructions.yaml"
"""Where a task's own variants stand, beside its task.yaml."""
WRITTEN = "as written"


@dataclass(frozen=True)
class Variant:
    """Instructions of every predictor, by its name; a predictor that is not named keeps its own."""

    name: str
    texts: Mapping[str, str]

    def words(self) -> int:
        return sum(len(text.split()) for text in self.texts.values())


def variants(study: Study, file: Path | None) -> list[Variant]:
    """The program's own instructions, and the variants of the file; without one, those made of its fields.

    Args:
        file: a YAML mapping of a variant's name to its text, or to a mapping of predictor to text. By
            default instructions.yaml of the task's folder, where there is one.

    Raises:
        TaskError: with every fault of the file.
    """
    program = study.program(study.captured)
    own = {name: predictor.signature.instructions for name, predictor in program.module.named_predictors()}
    written = Variant(WRITTEN, own)
    beside = study.run.task.folder / FILE
    given = file or (beside if beside.is_file() else None)
    if given is None:
        return [_bare(program), written, _steps(program)]
    return [written, *read(given, list(own))]


def read(file: Path, predictors: list[str]) -> list[Variant]:
    """The variants of a YAML file.

    Raises:
        TaskError: with every fault.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError([f"{file} cannot be read: {error}; write YAML, a name and a text a line"]) from None
    if not isinstance(tree, dict) or not tree:
        raise TaskError([f"{file.name} holds no mapping; write a variant's name and its text a line"])
    faults = [fault for name, value in tree.items() for fault in _faults(file.name, name, value, predictors)]
    if faults:
        raise TaskError(faults)
    return [
        Variant(str(name), value if isinstance(value, dict) else {predictors[0]: value})
        for name, value in tree.items()
    ]


def systems(study: Study, given: list[Variant]) -> list[System]:
    """Base and student with every variant."""
    return [
        System(_label(role, variant), role, study.registration(role), _with(study, variant))
        for role in ROLES
        for variant in given
    ]


def run(study: Study, given: list[Variant]) -> Outcome:
    """Ask base and student with every variant.

    Raises:
        RuntimeUnavailable: a model cannot be reached; what was answered so far is kept.
    """
    found = answered(study, systems(study, given), study.examples())
    means = {label: mean_interval(scores(rows), seed=study.seed) for label, rows in found.items()}
    too_long = [sum(overflowed(found[_label(role, each)]) for role in ROLES) for each in given]
    return _outcome(given, {role: [means[_label(role, each)] for each in given] for role in ROLES}, too_long)


def _faults(file: str, name: object, value: object, predictors: list[str]) -> list[str]:
    if name == WRITTEN:
        return [f"{file}: {name!r} is the name of the program's own instructions; take another"]
    if isinstance(value, str) and value.strip():
        many = f"{file}: {name!r} is one text, the program has the predictors {', '.join(predictors)}"
        return [] if len(predictors) == 1 else [f"{many}; write a mapping of predictor to text"]
    if not isinstance(value, dict) or not value:
        return [f"{file}: {name!r} holds no text; write the instructions behind it"]
    unknown = [
        f"{file}: {name!r} names {key!r}, which is no predictor" for key in value if key not in predictors
    ]
    empty = [
        f"{file}: {name!r} has no text for {key!r}"
        for key, text in value.items()
        if not isinstance(text, str) or not text.strip()
    ]
    return [f"{fault}; use {', '.join(predictors)}" for fault in unknown] + [
        f"{fault}; write one" for fault in empty
    ]


def _bare(program: Program) -> Variant:
    """What DSPy itself says where a signature has no words: the names of the fields."""
    return Variant(
        "bare",
        {
            name: f"Given the fields {_names(predictor.signature.input_fields)}, "
            f"produce the fields {_names(predictor.signature.output_fields)}."
            for name, predictor in program.module.named_predictors()
        },
    )


def _steps(program: Program) -> Variant:
    """The program's own instructions as a procedure: read, decide each field, check, answer."""
    texts = {}
    for name, predictor in program.module.named_predictors():
        signature = predictor.signature
        steps = [
            f"Read {_names(signature.input_fields)} to the end.",
            *(f"Decide `{field}`: use only what the input says." for field in signature.output_fields),
            "Check that every field follows from the input and has an allowed value.",
            "Answer with the fields alone, in their order.",
        ]
        numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
        texts[name] = f"{signature.instructions}\n\nProceed in these steps:\n{numbered}"
    return Variant("multi-step", texts)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in fields)


def _with(study: Study, variant: Variant) -> Program:
    program = study.program(study.captured)
    for name, predictor in program.module.named_predictors():
        if name in variant.texts:
            predictor.signature = _instructed(predictor.signature, variant.texts[name])
    return program


def _instructed(signature: Any, text: str) -> dspy.Signature:
    return signature.with_instructions(text)


def _label(role: str, variant: Variant) -> str:
    return f"{role}, {variant.name}"


def _outcome(
    given: list[Variant], by_role: Mapping[Role, list[Interval]], too_long: Sequence[int]
) -> Outcome:
    rows = [
        [
            variant.name,
            str(variant.words()),
            *percent(by_role["base"][at]),
            *percent(by_role["student"][at]),
            str(too_long[at]),
        ]
        for at, variant in enumerate(given)
    ]
    spread = {role: _spread(by_role[role]) for role in ROLES}
    picture = pictures.intervals(
        "Score by instructions",
        [variant.name for variant in given],
        [pictures.Series(role, by_role[role]) for role in ROLES],
    )
    return Outcome(
        title="Score by instructions",
        finding=_sentence(by_role, spread),
        table=Table(
            ("Instructions", "Words", "Base", "95 % interval", "Student", "95 % interval", "Did not fit"),
            rows,
            marked=WRITTEN,
        ),
        meaning=_meaning() | {f"“{each.name}”": _shown(each) for each in given},
        pictures=[Picture(picture, "Mean score with its 95 % interval.")],
        notes=unfit(too_long),
        figures={
            "variants": [
                {"name": each.name, "words": each.words(), "texts": dict(each.texts)}
                | {role: asdict(by_role[role][at]) for role in ROLES}
                for at, each in enumerate(given)
            ],
            "spread": spread,
        },
    )


def _sentence(by_role: Mapping[Role, list[Interval]], spread: Mapping[Role, float]) -> str:
    student = f"the student's score moves by {100 * spread['student']:.1f} points"
    if not any(interval.mean for interval in by_role["base"]):
        return f"The base scores 0 with all instructions; between its best and its worst ones {student}."
    return f"Between best and worst instructions {student}, the base's by {100 * spread['base']:.1f}."


def _spread(found: list[Interval]) -> float:
    means = [interval.mean for interval in found]
    return max(means) - min(means)


def _shown(variant: Variant) -> str:
    if len(variant.texts) == 1:
        return next(iter(variant.texts.values()))
    return " · ".join(f"{name}: {text}" for name, text in variant.texts.items())


def _meaning() -> dict[str, str]:
    return {
        "Base, student": "Mean score of the task's metric on the test examples with the greedy answer of the "
        "quantised model; only the instructions of the prompt change. Field names, types and demonstrations stay.",
        "Student": f"Fine-tuned on the instructions “{WRITTEN}” alone: the others are prompts that it was not trained on.",
        "Test examples": "The sealed test split. Whoever chooses instructions by this table should confirm the choice on new data.",
    }
