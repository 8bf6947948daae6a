"""Prompt optimisation of the teacher before its traces are captured, by DSPy's own optimizers."""

from __future__ import annotations

from typing import Any

import dspy

from trainer.data import Example
from trainer.errors import TaskError
from trainer.program import Program, adapter
from trainer.splits import shuffled

VALIDATION_SHARE = 0.2
RANDOM_SEARCH_CANDIDATES = 8


def optimize(program: Program, teacher: dspy.LM, train: list[Example]) -> dict[str, Any]:
    """Run the task's `teacher.optimizer` on training examples alone.

    Returns:
        The optimized program's state, as DSPy writes it to JSON.

    Raises:
        TaskError: too few training examples for it.
    """
    name = program.task.settings.teacher.optimizer
    if name == "none":
        return program.state
    if len(train) < 10:
        raise TaskError(
            [f"teacher.optimizer is {name}; it needs 10 training examples, there are {len(train)}"]
        )
    inputs = program.task.settings.inputs
    learned, validation = (
        [dspy.Example(**example.values).with_inputs(*inputs) for example in part] for part in divided(train)
    )
    with dspy.context(lm=teacher, adapter=adapter()):
        optimized = _compile(name, program, teacher, learned, validation)
    state: dict[str, Any] = optimized.dump_state()
    return state


def divided(train: list[Example]) -> tuple[list[Example], list[Example]]:
    """What an optimizer learns from, and what it chooses by: a random part, the same one every time."""
    mixed = shuffled(train)
    held_back = max(4, int(len(mixed) * VALIDATION_SHARE))
    return mixed[held_back:], mixed[:held_back]


def _compile(
    name: str, program: Program, teacher: dspy.LM, train: list[dspy.Example], validation: list[dspy.Example]
) -> dspy.Module:
    metric, module, seed = program.metric, program.module, program.task.settings.seed
    if name == "bootstrap":
        return dspy.BootstrapFewShot(metric=metric).compile(module, trainset=train)
    if name == "random_search":
        search = dspy.BootstrapFewShotWithRandomSearch(
            metric=metric,
            num_candidate_programs=RANDOM_SEARCH_CANDIDATES,
            num_threads=program.task.settings.teacher.concurrency,
        )
        return search.compile(module, trainset=train, valset=validation)
    if name == "mipro":
        mipro = dspy.MIPROv2(metric=metric, auto="light", prompt_model=teacher, task_model=teacher, seed=seed)
        return mipro.compile(module, trainset=train, valset=validation)
    gepa = dspy.GEPA(metric=_with_feedback(program), auto="light", reflection_lm=teacher, seed=seed)
    return gepa.compile(module, trainset=train, valset=validation)


def _with_feedback(program: Program) -> Any:
    """GEPA asks a metric with five arguments for a score and, where it has any, words about it."""

    def metric(
        gold: Any, prediction: Any, trace: Any = None, predictor: Any = None, predictor_trace: Any = None
    ) -> Any:
        return program.metric(gold, prediction, None)

    return metric
