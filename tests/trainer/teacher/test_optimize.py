"""DSPy's optimizers run on training examples alone, and their state is JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import dspy
import pytest
from dspy.lm15 import Message, Request, Response, Usage

from tests.tasks import SETTINGS, write_task
from trainer import program, task
from trainer.data import Example
from trainer.errors import TaskError
from trainer.teacher.optimize import divided, optimize


class Answers:
    """An engine that fills in every field it is asked for, the label rightly."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def complete(self, request: Request) -> Response:
        prompt = request.messages[-1].parts[0].text
        self.prompts.append(prompt)
        numbers = re.findall(r"word number (\d+)", prompt)
        parts = []
        for name in re.findall(r"`\[\[ ## (\w+) ## \]\]`", prompt):
            value = "odd" if numbers and int(numbers[-1]) % 2 else "even"
            parts.append(f"[[ ## {name} ## ]]\n{value if name == 'label' else f'Some {name}.'}")
        said = Message.assistant("\n\n".join(parts))
        usage = Usage(input_tokens=10, output_tokens=5)
        return Response(id=None, model=request.model, message=said, finish_reason="stop", usage=usage)


def prepared(folder: Path, optimizer: str) -> tuple[program.Program, dspy.LM, Answers, list[Example]]:
    teacher = {**SETTINGS["teacher"], "optimizer": optimizer}
    loaded = task.load(write_task(folder, rows=60, teacher=teacher))
    engine = Answers()
    lm = dspy.LM("openai/pretend", engine=engine, cache=False, num_retries=0)
    return program.load(loaded, judge=lm), lm, engine, task.examples(loaded)


@pytest.mark.parametrize("optimizer", ["bootstrap", "random_search", "mipro", "gepa"])
@pytest.mark.filterwarnings("ignore")  # the optimizers' own libraries warn of each other
def test_optimizers(tmp_path: Path, optimizer: str) -> None:
    before, lm, engine, examples = prepared(tmp_path, optimizer)
    state = optimize(before, lm, examples[:40])
    file = tmp_path / "program.json"
    file.write_text(json.dumps(state), encoding="utf-8")
    after = program.load(before.task, file)
    assert list(after.predictors) == ["sort"]
    assert engine.prompts
    asked = {int(number) for prompt in engine.prompts for number in re.findall(r"word number (\d+)", prompt)}
    assert asked <= set(range(40))  # nothing of the sealed examples


def test_bootstrap_adds_demonstrations_and_changes_the_program_hash(tmp_path: Path) -> None:
    before, lm, _, examples = prepared(tmp_path, "bootstrap")
    file = tmp_path / "program.json"
    file.write_text(json.dumps(optimize(before, lm, examples)), encoding="utf-8")
    after = program.load(before.task, file)
    assert after.state["sort"]["demos"]
    assert after.hash != before.hash


def test_data_that_is_sorted_by_class_is_validated_on_every_class(tmp_path: Path) -> None:
    _, _, _, examples = prepared(tmp_path, "none")
    by_class = sorted(examples, key=lambda example: str(example.values["label"]))
    learned, validation = divided(by_class)
    assert {example.values["label"] for example in validation} == {"even", "odd"}
    assert (len(learned), len(validation)) == (48, 12)
    assert divided(examples) == (learned, validation)


def test_none_costs_nothing(tmp_path: Path) -> None:
    before, lm, engine, examples = prepared(tmp_path, "none")
    assert optimize(before, lm, examples) == before.state
    assert engine.prompts == []


def test_too_few_examples_is_an_error(tmp_path: Path) -> None:
    before, lm, _, examples = prepared(tmp_path, "bootstrap")
    with pytest.raises(TaskError, match="needs 10 training examples, there are 3"):
        optimize(before, lm, examples[:3])
