"""The examples news, qa and confidence: tasks that load, data that is generated, metrics that tell right from wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy
import pytest
import yaml

from trainer import program, task
from trainer.provider import at_least
from trainer.splits import MIN_SEALED, assigned

ROOT = Path(__file__).resolve().parents[2] / "examples"
NAMES = ["news", "qa", "confidence"]


def load(name: str, file: str) -> ModuleType:
    """A module from a file outside any package."""
    spec = importlib.util.spec_from_file_location(f"{name}_{file}", ROOT / name / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    (file,) = (ROOT / name / "data").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_task_is_valid_and_its_splits_are_large_enough(name: str) -> None:
    loaded = task.load(ROOT / name)
    assert program.load(loaded).predictors
    splits = {split: len(found) for split, found in assigned(loaded).splits.items()}
    assert splits["train"] >= loaded.settings.curate.min_examples
    assert min(splits["calibrate"], splits["test"]) >= MIN_SEALED
    assert loaded.settings.teacher.stand_in


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_writes_the_committed_file(name: str) -> None:
    generate = load(name, "generate")
    (file,) = (ROOT / name / "data").glob("*.jsonl")
    assert generate.as_lines(generate.make_all()) == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_gold_answer_is_parsed_and_passes_strictly(name: str) -> None:
    """As the stand-in teacher says it, and as it would become training data."""
    loaded = program.load(task.load(ROOT / name))
    (predictor,) = loaded.predictors
    signature = dict(loaded.module.named_predictors())[predictor].signature
    keep = at_least(loaded.metric, loaded.task.settings.keep_score)
    for row in rows(name):
        said = dspy.ChatAdapter().format_assistant_message_content(signature, row)
        assert keep(dspy.Example(**row), dspy.Prediction(**loaded.parse(predictor, said)))


def test_the_names_of_a_report_stand_in_its_text() -> None:
    found = rows("news")
    assert all(name in row["text"] for row in found for name in row["entities"])
    assert all(row["entities"] for row in found)
    assert len({row["category"] for row in found}) == 6


NEWS = {
    "text": "Alma Corvin won the marathon of Ferrow. It rained.",
    "category": "sports",
    "entities": ["Alma Corvin", "Ferrow"],
    "summary": "Alma Corvin won the marathon.",
}


@pytest.mark.parametrize(
    ("changes", "passes", "strictly"),
    [
        ({}, True, True),
        ({"entities": ["alma  corvin", "FERROW"]}, True, True),
        ({"entities": ["Alma Corvin"]}, True, False),
        ({"entities": []}, False, False),
        ({"category": "culture"}, False, False),
        ({"summary": ""}, True, False),
        ({"summary": "word " * 26}, True, False),
        ({"summary": NEWS["text"]}, True, False),
    ],
)
def test_news_is_judged_more_strictly_while_tracing(
    changes: dict[str, Any], passes: bool, strictly: bool
) -> None:
    correct = load("news", "program").correct
    example, prediction = dspy.Example(**NEWS), dspy.Prediction(**{**NEWS, **changes})
    assert correct(example, prediction) is passes
    assert correct(example, prediction, trace=[]) is strictly


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("It lists open files.", 1.0),
        ("open files it LISTS", 1.0),
        ("It lists files.", 0.8),
        ("It lists closed files.", 2 / 3),
        ("No idea.", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_graded(said: str, score: float) -> None:
    graded = load("qa", "program").graded
    example = dspy.Example(question="?", answer="It lists open files.")
    assert graded(example, dspy.Prediction(answer=said)) == pytest.approx(score)


def test_a_long_winded_answer_is_no_training_data() -> None:
    graded = load("qa", "program").graded
    example = dspy.Example(question="?", answer="It lists open files.")
    long = dspy.Prediction(answer="It lists open files. " + "And so on. " * 20)
    assert graded(example, long) > 0
    assert graded(example, long, trace=[]) == 0


def test_an_answer_of_fillers_alone_is_compared_too() -> None:
    assert load("qa", "program").overlap("or", "or") == 1.0
    assert load("qa", "program").overlap("or", "and") == 0.0


def test_confidence_counts_while_tracing_only() -> None:
    correct = load("confidence", "program").correct
    example = dspy.Example(text="x", intent="dining", is_confident=False)
    for intent, sure, passes, strictly in [
        ("dining", False, True, True),
        ("dining", True, True, False),
        ("repair", False, False, False),
    ]:
        prediction = dspy.Prediction(intent=intent, is_confident=sure)
        assert (correct(example, prediction), correct(example, prediction, [])) == (passes, strictly)


def test_about_one_message_in_seven_is_vague() -> None:
    vague = sum(not row["is_confident"] for row in rows("confidence"))
    assert 20 <= vague <= 36


@pytest.mark.parametrize(("sure", "route", "intent"), [(True, "local", "dining"), (False, "api", "repair")])
def test_the_self_asked_hybrid_believes_the_model(sure: bool, route: str, intent: str) -> None:
    module = load("confidence", "program")
    local, api = module.Desk(), module.Desk()
    local.set_lm(dspy.utils.DummyLM([{"intent": "dining", "is_confident": str(sure)}]))
    api.set_lm(dspy.utils.DummyLM([{"intent": "repair", "is_confident": "True"}]))
    answer = module.SelfAsked(local, api)(text="something warm")
    assert (answer.route, answer.intent) == (route, intent)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_names_commands_that_fit(name: str) -> None:
    text = (ROOT / name / "README.md").read_text(encoding="utf-8")
    inputs = yaml.safe_load((ROOT / name / "task.yaml").read_text())["inputs"]
    assert f"homestill check examples/{name}" in text
    assert ("--inputs question" in text) == (inputs == ["question"])
    assert "stand-in" in text
